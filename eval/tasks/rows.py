"""Rows of a data set by `datasets`: from a local folder or file, or by hub id when the run may go online."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load(
    suite: str,
    source: str,
    stem: str | None = None,
    *,
    name: str | None = None,
    split: str = "test",
    fields: Sequence[str] = (),
    online: bool = False,
) -> Sequence[Mapping[str, Any]]:
    """The rows of one task.

    Args:
        suite: named in messages.
        source: a file, a folder with `stem`.jsonl (or .json, .parquet, .csv) somewhere in it, or a hub id.
        stem: name of the task's file in a folder; any data file where it is None.
        name, split: configuration and split of a hub data set.
        fields: what every row must have.
        online: whether a hub id may be downloaded; otherwise only what the local cache holds.

    Raises:
        ValueError: nothing there, no rows, or a missing field; the message says which.
    """
    from datasets import load_dataset
    from datasets.utils import disable_progress_bars

    disable_progress_bars()
    path = Path(source)
    try:
        if path.exists():
            file = _file(suite, path, stem)
            if not file.stat().st_size:
                raise ValueError(f"{suite}: {file} is empty.")
            rows: Any = load_dataset(FORMATS[file.suffix], data_files=str(file), split="train")
        else:
            rows = load_dataset(source, name=name, split=split)
    except ValueError:
        raise
    except Exception as error:  # datasets raises errors of many kinds of its own
        reason = " ".join(str(error).split())[:200]
        hint = "" if path.exists() or online else " Nothing is downloaded without --online."
        raise ValueError(f"{suite}: cannot read {source!r}: {type(error).__name__}: {reason}.{hint}") from error
    if not len(rows):
        raise ValueError(f"{suite}: {source!r} has no rows{f' for {stem}' if stem else ''}.")
    missing = [field for field in fields if field not in rows.column_names]
    if missing:
        raise ValueError(
            f"{suite}: {source!r}{f' ({stem})' if stem else ''} lacks the field {', '.join(missing)}; "
            f"it has {', '.join(rows.column_names)}."
        )
    return rows


def _file(suite: str, path: Path, stem: str | None) -> Path:
    if path.is_file():
        files = [path]
    else:
        files = sorted(f for f in path.rglob("*") if f.suffix in FORMATS and stem in (None, f.stem))
    files = [f for f in files if f.suffix in FORMATS]
    if not files:
        wanted = f"{stem or '*'}.jsonl (or {', '.join(list(FORMATS)[1:])})"
        raise ValueError(f"{suite}: no {wanted} in {path}.")
    return files[0]
