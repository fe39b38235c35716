"""`export`: a kernel repository as `kernels` 0.17 loads it: build/<variant>/{metadata.json, __init__.py, ...}."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from hf_attn_plugins._version import __version__
from hf_attn_plugins.core.staging import staged_folder, sweep
from hf_attn_plugins.hub.card import card
from hf_attn_plugins.hub.sources import PACKAGE, exported

ENTRY = "kernels.hub_entry"
INTERFACES = {
    "forward": ("flash_attn_forward", "supports_flash_attn"),
    "varlen": ("flash_attn_func", "flash_attn_varlen_func"),
}
BACKENDS = ("cpu", "cuda")
LICENSE, NEEDS = "Apache-2.0", "0.17.0"
_NAME = re.compile(r"[a-z][-a-z0-9]*[a-z0-9]")  # what `kernels` takes


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, and per variant the id under which `kernels` imports it, and its files' number."""

    folder: Path
    ids: dict[str, str]
    files: dict[str, int]


def export(
    folder: Path,
    *,
    name: str = "hf-attn-plugins",
    version: int = 1,
    interface: str = "forward",
    results: Path | None = None,
) -> Exported:
    """Write a kernel repository; it appears under its name only when it is complete.

    A process that is killed leaves a hidden folder beside it, which the next export there removes.

    Args:
        folder: does not exist yet, or is empty. Missing folders above it are made.
        name: lower case letters, digits and dashes.
        version: whole number; the repository's branch for it on the Hub is "v<version>".
        interface: "forward" takes Transformers' whole attention call, with masks as `sdpa` gets them. "varlen" has
            flash-attention's functions: padding is cut out, and continuous batching needs no mask, but only for a
            repository with "flash" in its name.
        results: a tiled.json of `hf-attn bench tiled`, whose numbers go into the model card.

    Raises:
        ValueError: a name, version or interface that is not allowed, a folder that holds something or that this
            process works in, or results that are no table of `hf-attn bench tiled`.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"name={name!r}: lower case letters, digits and dashes, such as hf-attn-plugins.")
    if version < 1:
        raise ValueError(f"version={version}: a whole number from 1.")
    if interface not in INTERFACES:
        raise ValueError(f"interface={interface!r}: choose one of {', '.join(INTERFACES)}.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: name another, or empty it first.")
    target = folder.resolve()
    if target == Path.cwd():
        raise ValueError(f"{folder} is the folder that you are in, which cannot be replaced: name a new one.")
    files = exported(ENTRY) | {"__init__.py": _front(interface)}
    digest = hashlib.sha256("\0".join(f"{path}\0{text}" for path, text in files.items()).encode()).hexdigest()[:12]
    ids = {backend: f"{name.replace('-', '_')}_{backend}_{digest}" for backend in BACKENDS}
    readme = card(name, version, interface, ids, results)
    target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    with staged_folder(target.name, target.parent) as stage:
        for backend, identity in ids.items():
            # PyTorch's operators have one name a process: the package and every exported kernel have their own.
            texts = {path: text.replace(f'"{PACKAGE}::', f'"{identity}::') for path, text in files.items()}
            metadata = json.dumps(_metadata(name, identity, version, backend, texts), indent=2) + "\n"
            _write(stage / "build" / f"torch-{backend}", texts | {"metadata.json": metadata})
        _write(stage, {"README.md": readme})
        os.chmod(stage, (stage / "build").stat().st_mode & 0o777)  # a stage is its owner's alone
        if target.exists():
            target.rmdir()
        os.rename(stage, target)
    return Exported(folder, ids, dict.fromkeys(ids, len(files)))


def _front(interface: str) -> str:
    names = INTERFACES[interface]
    return (
        f'"""Exact attention of {PACKAGE} {__version__}; written by `hf-attn export-kernel`."""\n\n'
        f"from .{ENTRY} import {', '.join(names)}\n\n__version__ = {__version__!r}\n__all__ = {list(names)!r}\n"
    )


def _metadata(name: str, identity: str, version: int, backend: str, texts: dict[str, str]) -> dict[str, object]:
    sums = {path: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for path, text in texts.items()}
    return {
        "name": name, "id": identity, "version": version, "kernels-minver": NEEDS, "license": LICENSE,
        "python-depends": [], "backend": {"type": backend}, "digest": {"algorithm": "sha256", "files": sums},
    }  # fmt: skip


def _write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as stream:
            stream.write(text.encode())
            stream.flush()
            os.fsync(stream.fileno())
