"""Star caches on disk: a folder of safetensors, one file a step of the encoding, and a manifest with their digests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_attn_plugins.core.files import digest
from hf_attn_plugins.core.staging import put, sweep
from hf_attn_plugins.hf.models.unwrap import language_model
from hf_attn_plugins.star.hf.cache import Layers, Record, cache_of, layers_of, record_of
from hf_attn_plugins.star.hf.fingerprint import fingerprint, tokenizer_fingerprint
from hf_attn_plugins.star.hf.manifest import CONSTANT, FORMAT, MANIFEST, TOKENS, file_name, read, read_manifest
from hf_attn_plugins.star.hf.model import text_config
from hf_attn_plugins.star.options import heads_of


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
            sweep(self.folder)
            self._write_manifest()
            return None
        sweep(self.folder)
        found = read_manifest(self.folder)
        _compare(found, self.manifest, self.folder)
        self._forget_unnamed({entry["name"] for entry in found["files"]})
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

        name = file_name(first, end)
        tensors = {"input_ids": self.ids[:, first:end].contiguous()}
        for index, pair in enumerate(layers):
            for kind, tensor in zip(("key", "value"), pair, strict=True):
                tensors[f"{kind}.{index}"] = tensor[:, :, first:end].contiguous()
        metadata = {name: json.dumps(value) for name, value in self.manifest.items() if name != "files"}
        put(self.folder / name, lambda path: save_file(tensors, path, metadata))
        entry = {"name": name, "first": first, "end": end, "sha256": digest(self.folder / name)}
        self.manifest["files"] = [*self.manifest["files"], entry]
        self._write_manifest()

    def finish(self) -> None:
        self.manifest["complete"] = True
        self._write_manifest()

    def _write_manifest(self) -> None:
        text = json.dumps(self.manifest, indent=1)
        put(self.folder / MANIFEST, lambda path: path.write_text(text, encoding="utf-8"))

    def _forget_unnamed(self, named: set[str]) -> None:
        """Remove what an encoding wrote just before it was killed: the manifest does not name it yet."""
        for path in self.folder.iterdir():
            if TOKENS.fullmatch(path.name) and path.name not in named:
                path.unlink(missing_ok=True)


def save(cache: Any, folder: str | Path, *, model: nn.Module | None = None, tokenizer: Any = None) -> None:
    """Write a star cache into a new folder; questions and answers it has grown by are left out.

    Args:
        model: writes the model's RoPE parameters beside the fingerprint, for a reader of the manifest.
        tokenizer: writes its fingerprint, which `load` then compares.

    Raises:
        ValueError: the folder holds a star cache already.
    """
    record = record_of(cache)
    if (Path(folder) / MANIFEST).exists() and read_manifest(Path(folder))["complete"]:
        raise ValueError(f"{folder} holds a star cache already: name another folder, or remove it.")
    extra: dict[str, Any] = {}
    if tokenizer is not None:
        extra["tokenizer"] = tokenizer_fingerprint(tokenizer)
    if model is not None:
        config = text_config(language_model(model))
        extra["rope"] = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    store = Store(folder)
    layers = store.begin(record, extra)  # a save that was killed goes on where it stopped
    done = 0 if layers is None else layers[0][0].shape[2]
    if done < record.length:
        store.add(layers_of(cache, record.length), done, record.length)
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
    folder, model = Path(folder), language_model(model)
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
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    vocabulary = embedding.weight.shape[0]
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(f"{folder} is damaged: it holds token ids outside of the vocabulary 0 .. {vocabulary - 1}.")
    device = embedding.weight.device
    sizes = {name: manifest[name] for name in ("block_size", "anchor_size", "max_length", "model", "halo_size")}
    record = Record(ids, **sizes, dense_heads=heads_of(manifest["dense_heads"]))
    return cache_of([(key.to(device), value.to(device)) for key, value in layers], record)


def about(record: Record) -> dict[str, Any]:
    """What a manifest says of a record."""
    return {
        "model": record.model,
        "length": record.length,
        "batch": len(record.context_ids),
        "block_size": record.block_size,
        "anchor_size": record.anchor_size,
        "halo_size": record.halo_size,
        "dense_heads": None if record.dense_heads is None else [list(heads) for heads in record.dense_heads],
        "max_length": record.max_length,
    }


def _compare(found: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    for name in CONSTANT:
        if found[name] != wanted[name]:
            raise ValueError(
                f"{folder} holds an encoding with {name}={found[name]!r}, asked for {wanted[name]!r}: name another "
                "folder, or pass what it was begun with."
            )
