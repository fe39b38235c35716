"""Patched checkpoints, written whole or not at all, recorded, and undone bit for bit."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_attn_plugins.checkpoint.source import CONFIG, Source, as_json, digest, need_space, open_source, read_json

RECORD = "hf_attn_patches.json"
KEPT = "hf_attn_patches"


@dataclass(frozen=True)
class Patch:
    """What a recipe wants done to a checkpoint.

    Attributes:
        recipe: its name.
        options: what it was asked for, JSON-ready.
        config: the new config.json.
        notes: lines that explain to the user what changes.
        extra: new files beside it: a name and a function that writes it to a path, with its size in bytes.
        verify: called with the folder as it will be, before anything is put in place; raises to stop.
    """

    recipe: str
    options: dict[str, Any]
    config: dict[str, Any]
    notes: list[str]
    extra: dict[str, tuple[Callable[[Path], None], int]] = field(default_factory=dict)
    verify: Callable[[Path], None] | None = None


def write_copy(source: Source, destination: Path, patch: Patch, hard_link: bool = False) -> None:
    """Write the patched checkpoint as a new folder; it appears under its name only when it is complete and verified.

    Args:
        destination: a path that does not exist yet, outside of the source.
        hard_link: share the unchanged files with the source instead of copying them. Whoever writes into such a file
            later (saving a model over the folder does) changes both.

    Raises:
        ValueError: the destination exists, or it and the source lie within each other.
        OSError: the disk is too small, or anything that writing raises; neither folder has changed then.
    """
    target = destination.resolve()
    if target == source.folder or target.is_relative_to(source.folder) or source.folder.is_relative_to(target):
        raise ValueError(f"{destination} and the source {source.folder} lie within each other: choose another place.")
    if destination.exists() or destination.is_symlink():
        raise ValueError(f"{destination} exists: a patch is never written over anything, choose a new path.")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target.parent}: no such folder to write into.")
    need_space(target.parent, (0 if hard_link else source.size) + _extra_size(patch))
    link = os.link if hard_link else shutil.copyfile
    with _staged(source, target.parent, patch, lambda a, b: link(a, b)) as stage:
        if patch.verify is not None:
            patch.verify(stage)
        os.chmod(stage, source.folder.stat().st_mode & 0o777)
        os.rename(stage, target)


def write_in_place(source: Source, patch: Patch) -> None:
    """Patch the checkpoint where it is; what is replaced is kept beside it for `undo`.

    Raises:
        ValueError: the source lies in the hub's cache.
        OSError: as in `write_copy`; the folder is as it was then.
    """
    if source.from_hub:
        raise ValueError(f"{source.folder} is in the hub's cache, which other programs share: write to a new folder.")
    folder = source.folder
    need_space(folder, _extra_size(patch))
    with _staged(source, folder.parent, patch, os.symlink) as stage:
        if patch.verify is not None:
            patch.verify(stage)
        entry = read_json(stage / RECORD)["patches"][-1]
        kept = folder / KEPT / str(entry["number"])
        before = (folder / RECORD).read_bytes() if (folder / RECORD).exists() else None
        moved: list[str] = []
        try:
            kept.mkdir(parents=True)
            for name, file in entry["files"].items():
                if file["before"] is not None:
                    shutil.copyfile(folder / name, kept / name)
            # The record first: should the process be killed in between, `undo` still knows what to restore.
            os.replace(stage / RECORD, folder / RECORD)
            for name in sorted(entry["files"], key=lambda name: name == CONFIG):
                moved.append(name)
                os.replace(stage / name, folder / name)
        except BaseException:
            for name in moved:
                _restore(folder, name, kept / name if entry["files"][name]["before"] is not None else None)
            if before is None:
                (folder / RECORD).unlink(missing_ok=True)
            else:
                _put(before, folder / RECORD)
            _forget(folder, kept)
            raise


def undo(folder: Path) -> dict[str, Any]:
    """Take back the last patch of a folder, bit for bit; returns its record.

    Raises:
        ValueError: nothing was patched there, or a file has changed since; nothing has been touched then.
    """
    record = patches_of(folder)
    if not record:
        raise ValueError(f"{folder} has no {RECORD}: it was not patched by hf-attn.")
    entry = record[-1]
    kept = folder / KEPT / str(entry["number"])
    restore = []
    for name, file in entry["files"].items():
        now = digest(folder / name) if (folder / name).is_file() else None
        if now == file["before"]:
            continue
        if now != file["after"]:
            raise ValueError(
                f"{folder / name} has changed since it was patched: undoing would lose that; nothing done."
            )
        if file["before"] is not None and (not (kept / name).is_file() or digest(kept / name) != file["before"]):
            raise ValueError(f"{kept / name}, the original of {name}, is missing or damaged: nothing done.")
        restore.append(name)
    for name in restore:
        _restore(folder, name, kept / name if entry["files"][name]["before"] is not None else None)
    if len(record) > 1:
        _put(as_json({"patches": record[:-1]}), folder / RECORD)
    else:
        (folder / RECORD).unlink()
    _forget(folder, kept)
    return entry


def patches_of(folder: Path) -> list[dict[str, Any]]:
    """What has been done to a checkpoint, oldest first; empty for one that was never patched.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: its record is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder.")
    if not (folder / RECORD).exists():
        return []
    found = read_json(folder / RECORD).get("patches")
    if not isinstance(found, list):
        raise ValueError(f"{folder / RECORD} holds no list of patches.")
    return found


@contextlib.contextmanager
def _staged(source: Source, beside: Path, patch: Patch, link: Callable[[Path, Path], object]) -> Iterator[Path]:
    """The patched folder under a temporary name; whatever is left of it at the end is removed."""
    stage = Path(tempfile.mkdtemp(prefix=f".{source.folder.name}.", dir=beside))
    try:
        changed = {CONFIG, RECORD, *patch.extra}
        taken = sorted(set(patch.extra) & set(source.files))
        if taken:
            raise ValueError(f"{source.folder} already has {', '.join(taken)}: undo that patch first.")
        for name in source.files:
            if name not in changed:
                (stage / name).parent.mkdir(parents=True, exist_ok=True)
                link((source.folder / name).resolve(), stage / name)
        (stage / CONFIG).write_bytes(as_json(patch.config))
        for name, (write, _) in patch.extra.items():
            write(stage / name)
        entries = patches_of(source.folder)
        number = len(entries) + 1
        kept = stage / KEPT / str(number)
        kept.mkdir(parents=True)
        shutil.copyfile(source.folder / CONFIG, kept / CONFIG)
        files: dict[str, Any] = {CONFIG: {"before": digest(source.folder / CONFIG), "after": digest(stage / CONFIG)}}
        files |= {name: {"before": None, "after": digest(stage / name)} for name in patch.extra}
        entries.append({"number": number, "recipe": patch.recipe, "options": patch.options, **_stamp(), "files": files})
        (stage / RECORD).write_bytes(as_json({"patches": entries}))
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _stamp() -> dict[str, str]:
    from importlib.metadata import version

    when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"time": when, "transformers": version("transformers"), "torch": version("torch")}


def _extra_size(patch: Patch) -> int:
    return len(as_json(patch.config)) + sum(size for _, size in patch.extra.values())


def _restore(folder: Path, name: str, original: Path | None) -> None:
    if original is None:
        (folder / name).unlink(missing_ok=True)
    else:
        _put(original.read_bytes(), folder / name)


def _put(content: bytes, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _forget(folder: Path, kept: Path) -> None:
    shutil.rmtree(kept, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / KEPT).rmdir()  # only when no earlier patch keeps files there


__all__ = ["KEPT", "RECORD", "Patch", "open_source", "patches_of", "undo", "write_copy", "write_in_place"]
