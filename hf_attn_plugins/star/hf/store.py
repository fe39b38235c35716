"""Star caches on disk: a folder of safetensors, one file a step of the encoding, and a manifest written last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.core.atomic import replace_file
from hf_attn_plugins.star.hf.cache import Layers, Record, cache_of, layers_of, record_of
from hf_attn_plugins.star.hf.model import fingerprint, text_config, tokenizer_fingerprint

MANIFEST = "star.json"
FORMAT = 1


class Store:
    """A folder that an encoding is written to; every file appears whole or not at all."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = {}
        self.ids = torch.empty(0)

    def begin(self, record: Record, extra: dict[str, Any] | None = None) -> Layers | None:
        """Start, or go on with, the encoding of `record`; what is there already is returned.

        Raises:
            ValueError: the folder holds an encoding of other tokens, another model or other sizes.
        """
        self.ids = record.context_ids
        self.manifest = {"format": FORMAT, **about(record), **(extra or {}), "complete": False, "files": []}
        if not (self.folder / MANIFEST).exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write_manifest()
            return None
        found = read_manifest(self.folder)
        _compare(found, self.manifest, self.folder)
        layers, ids = read(self.folder, found)
        if not layers:
            return None
        length = ids.shape[1]
        if length > record.length or not torch.equal(ids, record.context_ids[:, :length]):
            raise ValueError(
                f"{self.folder} holds {length} tokens of another context: name another folder, or remove it."
            )
        self.manifest["files"] = found["files"]
        return layers

    def add(self, layers: Layers, first: int, end: int) -> None:
        """Write tokens first..end of every layer."""
        from safetensors.torch import save_file

        name = f"tokens-{first:09d}-{end:09d}.safetensors"
        tensors = {"input_ids": self.ids[:, first:end].contiguous()}
        for index, pair in enumerate(layers):
            for kind, tensor in zip(("key", "value"), pair, strict=True):
                tensors[f"{kind}.{index}"] = tensor[:, :, first:end].contiguous()
        metadata = {name: json.dumps(value) for name, value in self.manifest.items() if name != "files"}
        replace_file(self.folder / name, lambda path: save_file(tensors, path, metadata))
        self.manifest["files"] = [*self.manifest["files"], {"name": name, "first": first, "end": end}]
        self._write_manifest()

    def finish(self) -> None:
        self.manifest["complete"] = True
        self._write_manifest()

    def _write_manifest(self) -> None:
        text = json.dumps(self.manifest, indent=1)
        replace_file(self.folder / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))


def save(cache: Any, folder: str | Path, *, model: nn.Module | None = None, tokenizer: Any = None) -> None:
    """Write a star cache into a new folder; questions and answers it has grown by are left out.

    Args:
        model: writes the model's RoPE parameters beside the fingerprint, for a reader of the manifest.
        tokenizer: writes its fingerprint, which `load` then compares.

    Raises:
        ValueError: the folder holds a star cache already.
    """
    record = record_of(cache)
    if (Path(folder) / MANIFEST).exists():
        raise ValueError(f"{folder} holds a star cache already: name another folder, or remove it.")
    extra: dict[str, Any] = {}
    if tokenizer is not None:
        extra["tokenizer"] = tokenizer_fingerprint(tokenizer)
    if model is not None:
        config = text_config(model)
        extra["rope"] = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    store = Store(folder)
    store.begin(record, extra)
    store.add(layers_of(cache, record.length), 0, record.length)
    store.finish()


def load(folder: str | Path, model: nn.Module, *, tokenizer: Any = None) -> Any:
    """Read a star cache that `save` or `encode(resume=...)` wrote.

    Args:
        model: the model it was made with; its layers' devices are taken over where one device holds the model.
        tokenizer: compared with the one that was saved, if both are there.

    Raises:
        FileNotFoundError: there is no such cache.
        ValueError: another model or tokenizer, an unfinished encoding, or a damaged folder.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if not manifest["complete"]:
        raise ValueError(
            f"{folder} holds an unfinished encoding: finish it with star.encode(..., resume={str(folder)!r})."
        )
    if manifest["model"] != fingerprint(model):
        raise ValueError(
            f"{folder} was encoded by another model (its config or weights differ): encode the context again."
        )
    if tokenizer is not None and "tokenizer" in manifest and manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise ValueError(f"{folder} was encoded with another tokenizer: token ids would mean other words.")
    layers, ids = read(folder, manifest)
    if ids.shape[1] != manifest["length"]:
        raise ValueError(f"{folder} is damaged: it holds {ids.shape[1]} of {manifest['length']} tokens.")
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    record = Record(ids, *(manifest[name] for name in ("block_size", "anchor_size", "max_length", "model")))
    return cache_of([(key.to(device), value.to(device)) for key, value in layers], record)


def about(record: Record) -> dict[str, Any]:
    """What a manifest says of a record."""
    return {
        "model": record.model,
        "length": record.length,
        "batch": len(record.context_ids),
        "block_size": record.block_size,
        "anchor_size": record.anchor_size,
        "max_length": record.max_length,
    }


def read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"{folder} holds no star cache: there is no {MANIFEST}.")
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} has format {manifest.get('format')}, this version reads {FORMAT}: encode again.")
    return manifest


def read(folder: Path, manifest: dict[str, Any]) -> tuple[Layers, Tensor]:
    """Keys and values of every layer and the token ids that a manifest's files hold together."""
    from safetensors.torch import load_file

    parts = []
    for entry in manifest["files"]:
        if not (folder / entry["name"]).exists():
            raise ValueError(f"{folder} is damaged: {entry['name']} is missing.")
        parts.append(load_file(folder / entry["name"]))
    if not parts:
        return [], torch.empty(manifest["batch"], 0, dtype=torch.long)
    count = sum(name.startswith("key.") for name in parts[0])

    def joined(name: str) -> Tensor:
        return torch.cat([part.pop(name) for part in parts], 2)

    layers = [(joined(f"key.{index}"), joined(f"value.{index}")) for index in range(count)]
    return layers, torch.cat([part["input_ids"] for part in parts], 1)


def _compare(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    for name in ("model", "batch", "block_size", "anchor_size", "max_length"):
        if found[name] != wanted[name]:
            raise ValueError(
                f"{folder} holds an encoding with {name}={found[name]!r}, asked for {wanted[name]!r}: name another "
                "folder, or pass what it was begun with."
            )
