"""Files that somebody else may have written (JSON objects, refused with one line), digests, and the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

DIGEST = re.compile(r"[0-9a-f]{64}")  # SHA-256 in hexadecimal
LARGEST_JSON = 1 << 26  # bytes; the index of a model of a thousand billion parameters has some ten million
DEEPEST_JSON = 64


def cache_folder() -> Path:
    """The package's folder in the user's cache, which need not exist: in $XDG_CACHE_HOME, else in ~/.cache.

    Raises:
        RuntimeError: this user has no home.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_attn_plugins"


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; FileNotFoundError or ValueError name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, at most {LARGEST_JSON} are read as JSON.")
    try:
        text = path.read_text(encoding="utf-8")
        found = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_nan)
        json.dumps(found, ensure_ascii=False).encode()  # text that UTF-8 cannot write again is refused here
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a JSON {type(found).__name__}, an object is needed.")
    level: list[Any] = [found]
    depth = 0
    while level:
        depth += 1
        if depth > DEEPEST_JSON:
            raise ValueError(f"{path} nests objects and lists more than {DEEPEST_JSON} deep.")
        level = [child for each in level for child in (each.values() if isinstance(each, dict) else each)
                 if isinstance(child, (dict, list))]  # fmt: skip
    return found


def manifest_in(
    folder: Path,
    name: str,
    version: int,
    wrong: Callable[[dict[str, Any]], str | None],
    *,
    of: str,
    advice: str,
    since: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The manifest `name` of a folder that this package wrote, with every field as it may be.

    Args:
        version: the format that is read.
        wrong: what is wrong with a manifest's fields, or None.
        of: what the folder should hold, for errors; `advice`: what to do when it is damaged.
        since: fields that older folders lack, and what they mean there.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no manifest, or of another format, or a field is wrong; the message names file and field.
    """
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no {of}: there is no {name}.")
    manifest = {**(since or {}), **read_json(path)}
    if manifest.get("format") != version:
        raise ValueError(f"{path} has format {manifest.get('format')!r}, this version reads {version}: {advice}.")
    damage = wrong(manifest)
    if damage:
        raise ValueError(f"{path} is damaged, {damage}: {advice}.")
    return manifest


def wrong_size(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> str | None:
    """What is wrong with the first of these fields that is no whole number of at least its least value, or None."""
    for name, least in sizes.items():
        value: Any = manifest.get(name)
        if not is_whole(value) or value < least:
            return f"{name} is {value!r}, a whole number of at least {least} is needed"
    return None


def is_digest(value: Any) -> bool:
    """Whether a value from JSON can be what `digest` returned."""
    return isinstance(value, str) and DIGEST.fullmatch(value) is not None


@contextlib.contextmanager
def tensors_in(path: Path, sha256: str, manifest: str) -> Iterator[Any]:
    """An open safetensors file whose digest is the one that the file `manifest` beside it has.

    Raises:
        ValueError: it is missing, a link, another file, or no safetensors file; the message names it.
    """
    from safetensors import SafetensorError, safe_open

    if path.is_symlink() or not path.is_file():
        raise ValueError(f"{path.parent} is damaged: {path.name} is missing, or no regular file.")
    if digest(path) != sha256:
        raise ValueError(f"{path} is damaged: its contents are not those that {manifest} was written for.")
    try:
        opened = safe_open(path, "pt")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    try:
        with opened as handle:
            yield handle
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}.") from error


def is_whole(value: Any) -> bool:
    """Whether a value from JSON is a whole number; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = sorted({name for name, _ in pairs if sum(name == other for other, _ in pairs) > 1})
        raise ValueError(f"the key {twice[0]!r} occurs twice")
    return found


def _no_nan(text: str) -> float:
    if text == "NaN":
        raise ValueError("NaN is no number that a config can mean")
    return float(text)  # Infinity: some state-space models' configs hold it


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()
