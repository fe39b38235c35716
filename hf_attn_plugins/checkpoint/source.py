"""Checkpoints as folders: found, listed, and refused by name when something in them is not safe to read or to copy."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Source:
    """A checkpoint that passed every check of `open_source`.

    Attributes:
        folder: where its files are.
        files: paths relative to the folder, sorted, symlinks included.
        config: the parsed config.json.
        weights: names of the safetensors files that hold the model.
        from_hub: whether it lies in the hub's local cache, which must never be written to.
    """

    folder: Path
    files: tuple[str, ...]
    config: dict[str, Any]
    weights: tuple[str, ...]
    from_hub: bool

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum((self.folder / name).stat().st_size for name in self.files)


def open_source(given: str | Path) -> Source:
    """Find a checkpoint and check it without loading anything.

    Args:
        given: a folder, or a hub id ("org/name") whose snapshot is in the local cache; nothing is downloaded.

    Raises:
        FileNotFoundError: no such folder, no cached snapshot, no config.json, or a shard of the index is missing.
        ValueError: a config that is no JSON object, a symlink that leaves the folder, a damaged safetensors file, or
            weights that exist as pickles only.
    """
    folder, root = _locate(given)
    files = tuple(sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_symlink() or p.is_file()))
    for name in files:
        path = folder / name
        if not path.resolve().is_relative_to(root):
            raise ValueError(f"{path} is a symlink to {path.resolve()}, outside of the checkpoint: copy the file in.")
        if path.is_dir():
            raise ValueError(f"{path} is a symlink to a folder: checkpoints with such links are not patched.")
        if not path.is_file():
            raise FileNotFoundError(f"{path} is a symlink to nothing.")
    config = read_json(folder / CONFIG)
    return Source(folder, files, config, _weights(folder, files), root != folder)


def _locate(given: str | Path) -> tuple[Path, Path]:
    folder = Path(given)
    if folder.is_dir():
        return folder.resolve(), folder.resolve()
    if folder.exists() or not HUB_ID.fullmatch(str(given)):
        raise FileNotFoundError(f"{given}: no checkpoint folder there (nor an id of the form org/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(str(given), local_files_only=True)).resolve()
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{given}: neither a folder nor in the hub's local cache; download it first."
        ) from error
    # A snapshot's files are links to blobs two folders up.
    return snapshot, snapshot.parent.parent


def _weights(folder: Path, files: tuple[str, ...]) -> tuple[str, ...]:
    if SINGLE in files:
        names = [SINGLE]
    elif INDEX in files:
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict):
            raise ValueError(f"{folder / INDEX} has no weight_map.")
        names = sorted(set(shards.values()))
        missing = [name for name in names if name not in files]
        if missing:
            raise FileNotFoundError(f"{folder / INDEX} names {', '.join(missing)}, missing in the folder.")
    else:
        pickled = [name for name in files if name.endswith(PICKLES)]
        if pickled:
            raise ValueError(
                f"{folder / pickled[0]} is a pickle, which can run code when it is loaded: convert the checkpoint to "
                "safetensors first (load it where you trust it, then save_pretrained)."
            )
        raise FileNotFoundError(f"{folder} has neither {SINGLE} nor {INDEX}.")
    for name in names:
        _check_safetensors(folder / name)
    return tuple(names)


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}.") from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; FileNotFoundError or ValueError name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a JSON {type(found).__name__}, an object is needed.")
    return found


def as_json(content: dict[str, Any]) -> bytes:
    """A JSON object as Transformers writes its configs: two spaces, a final newline; the order of keys is kept."""
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    hasher = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            hasher.update(block)
    return hasher.hexdigest()


def need_space(folder: Path, size: int) -> None:
    """Raise OSError when the disk of `folder` has less than `size` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"{folder} has {free / 1e6:.0f} MB left, {size / 1e6:.0f} MB are needed: nothing was written.")
