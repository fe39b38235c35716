"""A star cache's folder, read as if somebody else had written it: names, ranges, digests, shapes, sizes come first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.files import is_digest, is_whole, manifest_in, tensors_in, wrong_size
from hf_attn_plugins.star.hf.cache import Layers
from hf_attn_plugins.star.options import heads_of

MANIFEST = "star.json"
FORMAT = 1
TOKENS = re.compile(r"tokens-[0-9]{9,}-[0-9]{9,}\.safetensors")
# The same in every file.
CONSTANT = ("model", "batch", "block_size", "anchor_size", "max_length", "halo_size", "dense_heads")
# Fields that older folders lack, and what they mean there.
SINCE_THEN: dict[str, Any] = {"halo_size": 0, "dense_heads": None}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, every field of the kind and in the range that `Store` writes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no manifest, or of another format, or a field is wrong; the message names file and field.
    """
    return manifest_in(
        folder, MANIFEST, FORMAT, _wrong, of="star cache", advice="encode the context again", since=SINCE_THEN
    )


def _wrong(manifest: dict[str, Any]) -> str | None:
    """What no encoding writes into a manifest, or None."""
    sizes = {"length": 0, "batch": 1, "block_size": 1, "anchor_size": 0, "max_length": 0, "halo_size": 0}
    wrong = wrong_size(manifest, sizes)
    if wrong:
        return wrong
    if manifest["anchor_size"] > manifest["block_size"] + manifest["halo_size"]:
        return (
            f"anchor_size {manifest['anchor_size']} is larger than block_size {manifest['block_size']} and halo_size "
            f"{manifest['halo_size']} together"
        )
    try:
        heads_of(manifest["dense_heads"])
    except ValueError as error:
        return str(error)
    if not isinstance(manifest.get("model"), str) or not isinstance(manifest.get("tokenizer", ""), str):
        return "the fingerprint of the model or of the tokenizer is no text"
    if not isinstance(manifest.get("complete"), bool) or not isinstance(manifest.get("files"), list):
        return "complete is no truth value, or files no list"
    end = 0
    for entry in manifest["files"]:
        if not isinstance(entry, dict) or not is_whole(entry.get("first")) or not is_whole(entry.get("end")):
            return f"{entry!r} names no file with its first and last token"
        if entry["first"] != end or entry["end"] <= end:
            return f"a file of tokens {entry['first']} to {entry['end']} follows {end} tokens"
        end = entry["end"]
        if entry.get("name") != file_name(entry["first"], end):
            return f"{entry.get('name')!r} is not the name of a file of tokens {entry['first']} to {end}"
        if not is_digest(entry.get("sha256")):
            return f"{entry['name']} has no digest sha256"
    if end > manifest["length"] or (manifest["complete"] and end < manifest["length"]):
        return f"its files hold {end} tokens of {manifest['length']}"
    return None


def file_name(first: int, end: int) -> str:
    return f"tokens-{first:09d}-{end:09d}.safetensors"


def read(folder: Path, manifest: dict[str, Any]) -> tuple[Layers, Tensor]:
    """Keys and values of every layer and the token ids that a manifest's files hold together.

    Raises:
        ValueError: a file is missing, is not the one that the manifest was written for, or does not fit the others.
    """
    parts = [_part(folder / entry["name"], entry, manifest) for entry in manifest["files"]]
    if not parts:
        return [], torch.empty(manifest["batch"], 0, dtype=torch.long)
    facts = [{name: _facts(tensor) for name, tensor in part.items()} for part in parts]
    for entry, each in zip(manifest["files"], facts, strict=True):
        if each != facts[0]:
            raise ValueError(f"{folder / entry['name']} is damaged: its tensors do not fit those of the first file.")
    count = (len(parts[0]) - 1) // 2

    def joined(name: str) -> Tensor:
        return torch.cat([part.pop(name) for part in parts], 2)

    layers = [(joined(f"key.{index}"), joined(f"value.{index}")) for index in range(count)]
    return layers, torch.cat([part["input_ids"] for part in parts], 1)


def _part(path: Path, entry: dict[str, Any], manifest: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of one file, each of the shape that its tokens ask for."""
    with tensors_in(path, entry["sha256"], MANIFEST) as handle:
        metadata = handle.metadata() or {}
        try:
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}.") from error
    for name in CONSTANT:
        written = metadata.get(name, json.dumps(SINCE_THEN.get(name)))
        if written != json.dumps(manifest[name]):
            raise ValueError(f"{path} was written with {name}={written}, {MANIFEST} says {manifest[name]!r}.")
    ids, count = tensors.get("input_ids"), (len(tensors) - 1) // 2
    lead = (manifest["batch"], entry["end"] - entry["first"])
    names = {"input_ids", *(f"{kind}.{index}" for kind in ("key", "value") for index in range(count))}
    if ids is None or ids.dtype != torch.long or tuple(ids.shape) != lead or set(tensors) != names or not count:
        raise ValueError(f"{path} is damaged: input_ids {lead}, and a key and a value of each layer, are needed.")
    for name, tensor in tensors.items():
        if name == "input_ids":
            continue
        key = tensors["key." + name.split(".")[1]]
        if tensor.ndim != 4 or (tensor.shape[0], tensor.shape[2]) != lead or tensor.shape[1] != key.shape[1]:
            raise ValueError(f"{path} is damaged: {name} is {tuple(tensor.shape)}, {lead} rows and tokens are needed.")
        if not tensor.is_floating_point():
            raise ValueError(f"{path} is damaged: {name} is {tensor.dtype}, no floating-point numbers.")
    return tensors


def _facts(tensor: Tensor) -> tuple[Any, ...]:
    """What the same tensor of another file has in common: all but its tokens."""
    shape = (tensor.shape[0],) if tensor.ndim == 2 else (*tensor.shape[:2], tensor.shape[3])
    return tensor.dtype, *shape
