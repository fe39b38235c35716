"""Patched checkpoints, written whole or not at all, recorded, and undone bit for bit."""

from __future__ import annotations

import contextlib
import datetime
import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hf_attn_plugins.checkpoint.card import CARD
from hf_attn_plugins.checkpoint.config import as_json, naming
from hf_attn_plugins.checkpoint.record import KEPT, RECORD, Patch, interrupted, patches_of
from hf_attn_plugins.checkpoint.source import CONFIG, Source, need_space, open_source
from hf_attn_plugins.core.files import digest, read_json
from hf_attn_plugins.core.staging import exclusive, put, staged_folder, sweep

logger = logging.getLogger("hf_attn_plugins")
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)


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
    _say_foreign(sweep(target.parent))
    need_space(target.parent, (0 if hard_link else source.size) + _extra_size(patch))
    with _staged(source, target.parent, patch, _hard_link if hard_link else _copy) as stage:
        _verify(patch, source, stage)
        os.chmod(stage, source.folder.stat().st_mode & 0o777)
        os.rename(stage, target)


def write_in_place(source: Source, patch: Patch) -> None:
    """Patch the checkpoint where it is; what is replaced is kept beside it for `undo`.

    Everything is prepared in a hidden folder inside of the checkpoint's, so that a mounted folder, or one whose parent
    cannot be written to, is no obstacle. A process killed at any step leaves a checkpoint that `undo` restores, or that
    was not changed at all; the next patch or undo removes what is left over.

    Raises:
        ValueError: the source lies in the hub's cache.
        OSError: as in `write_copy`; the folder is as it was then.
    """
    refuse_in_place(source)
    folder = source.folder
    with exclusive(folder):
        _clean(folder)
        need_space(folder, _extra_size(patch))
        with _staged(source, folder, patch, _symlink) as stage:
            _verify(patch, source, stage)
            _put_in_place(folder, stage)


def _put_in_place(folder: Path, stage: Path) -> None:
    entry = read_json(stage / RECORD)["patches"][-1]
    kept = folder / KEPT / str(entry["number"])
    before = (folder / RECORD).read_bytes() if (folder / RECORD).exists() else None
    moved: list[str] = []
    try:
        kept.parent.mkdir(exist_ok=True)
        os.rename(stage / KEPT / kept.name, kept)
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


def refuse_in_place(source: Source) -> None:
    """Raise ValueError for a source that other programs share."""
    if source.from_hub:
        raise ValueError(f"{source.folder} is in the hub's cache, which other programs share: write to a new folder.")


def undo(folder: Path) -> dict[str, Any]:
    """Take back the last patch of a folder, bit for bit; returns its record. A model card that was edited since stays.

    Raises:
        ValueError: nothing was patched there, or a file has changed since; nothing has been touched then.
        OSError: another process is changing the folder.
    """
    record = patches_of(folder)
    if not record:
        raise ValueError(f"{folder} has no {RECORD}: it was not patched by hf-attn.")
    entry = record[-1]
    kept = folder / KEPT / str(entry["number"])
    with exclusive(folder):
        for path in (kept.parent, kept):
            if path.is_symlink():
                raise ValueError(f"{path} is a symlink, originals are kept in a folder: nothing done.")
        restore = []
        for name, file in entry["files"].items():
            now = digest(folder / name) if (folder / name).is_file() else None
            if now == file["before"]:
                continue
            if now != file["after"] and name == CARD:
                logger.warning("%s was edited since it was patched: it stays as it is.", folder / name)
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
        _clean(folder)
    return entry


@contextlib.contextmanager
def _staged(source: Source, beside: Path, patch: Patch, link: Callable[[Path, Path], object]) -> Iterator[Path]:
    """The patched folder under a temporary name; whatever is left of it at the end is removed."""
    with staged_folder(source.folder.name, beside) as stage:
        changed = {CONFIG, RECORD, *patch.extra, *patch.rewritten}
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
        for name, content in patch.rewritten.items():
            (stage / name).write_bytes(content)
        entries = patches_of(source.folder)
        number = max([0, *(entry["number"] for entry in entries)]) + 1
        kept = stage / KEPT / str(number)
        kept.mkdir(parents=True)
        shutil.copyfile(source.folder / CONFIG, kept / CONFIG)
        files: dict[str, Any] = {CONFIG: {"before": digest(source.folder / CONFIG), "after": digest(stage / CONFIG)}}
        files |= {name: {"before": None, "after": digest(stage / name)} for name in patch.extra}
        for name in patch.rewritten:
            there = name in source.files
            if there:
                shutil.copyfile(source.folder / name, kept / name)
            before = digest(source.folder / name) if there else None
            files[name] = {"before": before, "after": digest(stage / name)}
        entries.append({"number": number, "recipe": patch.recipe, "options": patch.options, **_stamp(), "files": files})
        (stage / RECORD).write_bytes(as_json({"patches": entries}))
        for path in (
            stage / CONFIG,
            stage / RECORD,
            kept / CONFIG,
            *(stage / name for name in (*patch.extra, *patch.rewritten)),
        ):
            shutil.copymode(source.folder / CONFIG, path)
            with path.open("rb") as handle:
                os.fsync(handle.fileno())
        yield stage


def _verify(patch: Patch, source: Source, stage: Path) -> None:
    if patch.verify is not None:
        with naming(source.folder, stage):
            patch.verify(stage)


def _clean(folder: Path) -> None:
    """Remove what killed patches have left in a checkpoint: half-written files, and originals that no record names."""
    _say_foreign(sweep(folder))
    kept, named = folder / KEPT, {str(entry["number"]) for entry in patches_of(folder)}
    if kept.is_dir() and not kept.is_symlink():
        for path in kept.iterdir():
            if path.name.isdigit() and path.name not in named and path.is_dir() and not path.is_symlink():
                _forget(folder, path)
        with contextlib.suppress(OSError):
            kept.rmdir()


def _say_foreign(paths: list[Path]) -> None:
    for path in paths:
        logger.warning("%s: left or being written by another machine; remove it if nothing is at work there.", path)


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def _hard_link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno in (errno.EXDEV, *NO_LINKS):
            raise OSError(
                f"{source} cannot be shared with another disk or file system: leave --hard-link out."
            ) from error
        raise


def _symlink(source: Path, target: Path) -> None:
    try:
        os.symlink(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(source, target)  # a file system without links, such as a memory card's


def _stamp() -> dict[str, str]:
    when = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"time": when, "transformers": version("transformers"), "torch": version("torch")}


def _extra_size(patch: Patch) -> int:
    written = len(as_json(patch.config)) + sum(map(len, patch.rewritten.values()))
    return written + sum(size for _, size in patch.extra.values())


def _restore(folder: Path, name: str, original: Path | None) -> None:
    if original is None:
        (folder / name).unlink(missing_ok=True)
    else:
        _put(original.read_bytes(), folder / name)


def _put(content: bytes, path: Path) -> None:
    put(path, lambda temporary: temporary.write_bytes(content))


def _forget(folder: Path, kept: Path) -> None:
    shutil.rmtree(kept, ignore_errors=True)
    with contextlib.suppress(OSError):
        (folder / KEPT).rmdir()  # only when no earlier patch keeps files there


__all__ = [
    "KEPT",
    "RECORD",
    "Patch",
    "interrupted",
    "open_source",
    "patches_of",
    "refuse_in_place",
    "undo",
    "write_copy",
    "write_in_place",
]
