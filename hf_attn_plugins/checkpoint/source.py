"""Checkpoints as folders: found, listed, and refused by name when something in them is not safe to read or to copy."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_attn_plugins.checkpoint.config import as_json, check_config
from hf_attn_plugins.checkpoint.record import KEPT, patches_of
from hf_attn_plugins.core.files import digest, read_json
from hf_attn_plugins.core.staging import is_staging

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
        ValueError: a config that is no JSON object or has fields of the wrong kind, a symlink that leaves the folder
            (one into the blobs of the hub's cache may), a damaged safetensors file, or weights that exist as pickles
            only.
    """
    folder, root = _locate(given)
    files = tuple(sorted(_files(folder, None if root == folder else root / "blobs")))
    config = read_json(folder / CONFIG)
    check_config(folder / CONFIG, config)
    return Source(folder, files, config, _weights(folder, files), root != folder)


def _files(folder: Path, blobs: Path | None) -> Iterator[str]:
    """Names of the checkpoint's files; what a killed patch has left in the folder is none of them."""
    named = {str(entry["number"]) for entry in patches_of(folder)}
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if is_staging(name.parts[0]) or (name.parts[0] == KEPT and len(name.parts) > 1 and name.parts[1] not in named):
            continue
        if path.is_symlink():
            try:
                target = path.resolve()
            except (OSError, RuntimeError) as error:  # RuntimeError: Python below 3.13, on links in a circle
                raise ValueError(f"{path} is a symlink that leads nowhere: {error}.") from error
            if not target.is_relative_to(folder) and (blobs is None or not target.is_relative_to(blobs)):
                raise ValueError(f"{path} is a symlink to {target}, outside of the checkpoint: copy the file in.")
            if path.is_dir():
                raise ValueError(f"{path} is a symlink to a folder: checkpoints with such links are not patched.")
            if not path.exists():
                raise FileNotFoundError(f"{path} is a symlink to nothing.")
        elif path.is_dir():
            continue
        if not path.is_file():
            raise ValueError(f"{path} is no regular file (a pipe, a socket or a device): remove it.")
        yield str(name)


def _locate(given: str | Path) -> tuple[Path, Path]:
    folder = Path(given)
    if folder.is_dir():
        folder = folder.resolve()
        return folder, _hub_repository(folder) or folder
    if folder.exists() or not HUB_ID.fullmatch(str(given)):
        raise FileNotFoundError(f"{given}: no checkpoint folder there (nor an id of the form org/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        snapshot = Path(snapshot_download(str(given), local_files_only=True)).resolve()
    except (LocalEntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{given}: neither a folder nor in the hub's local cache; download it first."
        ) from error
    return snapshot, snapshot.parent.parent


def _hub_repository(folder: Path) -> Path | None:
    """The repository in the hub's cache that a snapshot's folder belongs to, whose blobs its links may lead to."""
    for path in (folder, *folder.parents):
        if path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--"):
            return path.parent.parent
    return None


def _weights(folder: Path, files: tuple[str, ...]) -> tuple[str, ...]:
    if SINGLE in files:
        names = [SINGLE]
    elif INDEX in files:
        shards = read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not shards:
            raise ValueError(f"{folder / INDEX} has no weight_map: an object of tensor and file names is needed.")
        for tensor, name in shards.items():
            if not isinstance(name, str):
                raise ValueError(f"{folder / INDEX}: the weight_map gives {tensor!r} the file {name!r}, not a name.")
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
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}.") from error


def need_space(folder: Path, size: int) -> None:
    """Raise OSError when the disk of `folder` has less than `size` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(f"{folder} has {free / 1e6:.0f} MB left, {size / 1e6:.0f} MB are needed: nothing was written.")


__all__ = ["CONFIG", "INDEX", "SINGLE", "Source", "as_json", "digest", "need_space", "open_source", "read_json"]
