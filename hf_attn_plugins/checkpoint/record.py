"""What a recipe wants done to a checkpoint, and the record of what was done, refused where no patch wrote it."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_attn_plugins.core.files import digest, read_json

RECORD = "hf_attn_patches.json"
KEPT = "hf_attn_patches"  # folder of the originals, one folder a patch
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Patch:
    """What a recipe wants done to a checkpoint.

    Attributes:
        recipe: its name.
        options: what it was asked for, JSON-ready.
        config: the new config.json.
        notes: lines that explain to the user what changes.
        extra: new files beside it: a name and a function that writes it to a path, with its size in bytes.
        rewritten: contents of other files, which may exist: the model card.
        verify: called with the folder as it will be, before anything is put in place; raises to stop.
    """

    recipe: str
    options: dict[str, Any]
    config: dict[str, Any]
    notes: list[str]
    extra: dict[str, tuple[Callable[[Path], None], int]] = field(default_factory=dict)
    verify: Callable[[Path], None] | None = None
    rewritten: dict[str, bytes] = field(default_factory=dict)


def interrupted(folder: Path) -> bool:
    """Whether the last patch of a folder was killed between its first and its last step; then `undo` takes it back.

    Raises:
        FileNotFoundError, ValueError: as `patches_of`.
    """
    entries = patches_of(folder)
    if not entries:
        return False
    states = []
    for name, file in entries[-1]["files"].items():
        now = digest(folder / name) if (folder / name).is_file() else None
        states.append("after" if now == file["after"] else "before" if now == file["before"] else "changed")
    return "before" in states and "changed" not in states


def patches_of(folder: Path) -> list[dict[str, Any]]:
    """What has been done to a checkpoint, oldest first; empty for one that was never patched.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: its record is damaged.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder.")
    path = folder / RECORD
    if not path.exists() and not path.is_symlink():
        return []
    found = read_json(path).get("patches")
    if not isinstance(found, list):
        raise ValueError(f"{path} holds no list of patches.")
    for entry in found:
        wrong = _wrong_entry(entry)
        if wrong:
            raise ValueError(f"{path} is damaged: {wrong}; nothing done.")
    return found


def _wrong_entry(entry: Any) -> str | None:
    """What makes an entry of a record one that no patch has written, or None."""
    if not isinstance(entry, dict) or not isinstance(entry.get("files"), dict):
        return "a patch is no object with files"
    number = entry.get("number")
    if not isinstance(number, int) or isinstance(number, bool) or not 1 <= number < 1 << 31:
        return f"a patch has the number {number!r}"
    for name in ("recipe", "time", "transformers", "torch"):
        if not isinstance(entry.get(name), str):
            return f"patch {number} has no {name}"
    for name, file in entry["files"].items():
        if not _plain(name):
            return f"patch {number} names the file {name!r}, which is no plain name"
        digests = [file.get("before"), file.get("after")] if isinstance(file, dict) else [0]
        if not all(each is None or (isinstance(each, str) and DIGEST.fullmatch(each)) for each in digests):
            return f"patch {number} has no digests of {name!r}"
    return None


def _plain(name: str) -> bool:
    return name not in ("", ".", "..", RECORD, KEPT) and not any(c in name for c in "/\\\0")
