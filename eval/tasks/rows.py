"""Rows of a data set by `datasets`: from a local folder or file, or by hub id when the run may go online."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_attn_plugins.hf.inputs.texts import read_text

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def load(
    suite: str,
    source: str,
    stem: str | None = None,
    *,
    name: str | None = None,
    split: str = "test",
    fields: Sequence[str] = (),
    features: Mapping[str, str] | None = None,
    archive: tuple[str, str, str] | None = None,
    online: bool = False,
) -> Sequence[Mapping[str, Any]]:
    """The rows of one task.

    Args:
        suite: named in messages.
        source: a file, a folder with `stem`.jsonl (or .json, .parquet, .csv) somewhere in it, or a hub id.
        stem: name of the task's file in a folder; any data file where it is None.
        name, split: configuration and split of a hub data set.
        fields: what every row must have.
        features: types of a hub data set's fields, "string" or "strings", where its files alone do not tell.
        archive: (hub id, zip file in it, file in that) of a data set whose hub id holds no files that `datasets` reads.
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
            marked = _begins_with_mark(file) and FORMATS[file.suffix] == "json"
            rows: Any = _parsed(suite, file) if marked else _read(file)
        elif archive is not None and source == archive[0]:
            from huggingface_hub import hf_hub_download

            rows = _read(f"zip://{archive[2]}::{hf_hub_download(archive[0], archive[1], repo_type='dataset')}")
        else:
            rows = load_dataset(source, name=name, split=split, features=_features(features))
    except Exception as error:  # datasets and the hub raise errors of many kinds of their own
        if str(error).startswith(f"{suite}: "):
            raise
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


def _read(file: str | Path) -> Any:
    from datasets import load_dataset

    return load_dataset(FORMATS[Path(str(file).split("::")[0]).suffix], data_files=str(file), split="train")


def _begins_with_mark(file: Path) -> bool:
    with open(file, "rb") as opened:
        return opened.read(3) == codecs.BOM_UTF8


def _parsed(suite: str, file: Path) -> Any:
    """Rows of a JSON or JSON-lines file with a byte order mark, which the reader of `datasets` does not skip."""
    from datasets import Dataset

    text = read_text(file)
    try:
        rows = (
            json.loads(text)
            if text.lstrip().startswith("[")
            else [json.loads(x) for x in text.split("\n") if x.strip()]
        )
    except ValueError as error:
        raise ValueError(f"{suite}: {file}: no JSON ({error}).") from error
    return Dataset.from_list(rows)


def _features(kinds: Mapping[str, str] | None) -> Any:
    if kinds is None:
        return None
    from datasets import Features, List, Value

    return Features({name: List(Value("string")) if kind == "strings" else Value(kind) for name, kind in kinds.items()})


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
