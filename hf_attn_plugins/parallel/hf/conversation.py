"""The folder of a conversation saved on several ranks, read as if somebody else had written it.

    conversation.json                      manifest: sizes, fingerprints, and the digest of every file
    tokens.safetensors                     input_ids and attention_mask
    keys-00000-of-00004.safetensors ...    what each rank stored: columns (B, S), and key.i and value.i of every layer

A *place* is a key of one rank's file; places are counted over all files in the order of the ranks.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.files import is_digest, is_whole, manifest_in, tensors_in, wrong_size

MANIFEST, TOKENS = "conversation.json", "tokens.safetensors"
FORMAT = 1
KEYS = re.compile(r"keys-[0-9]{5,}-of-[0-9]{5,}\.safetensors")


def keys_name(rank: int, size: int) -> str:
    """The name of the file that rank `rank` of `size` writes."""
    return f"keys-{rank:05d}-of-{size:05d}.safetensors"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, every field of the kind and in the range that `store.save` writes.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no manifest, or of another format, or a field is wrong; the message names file and field.
    """
    return manifest_in(folder, MANIFEST, FORMAT, _wrong, of="conversation", advice="read the prompt again")


def _wrong(manifest: dict[str, Any]) -> str | None:
    """What no session writes into a manifest, or None."""
    wrong = wrong_size(manifest, {"batch": 1, "length": 1, "tokens": 1, "layers": 1})
    if wrong:
        return wrong
    if manifest["length"] > manifest["tokens"]:
        return f"it caches {manifest['length']} of {manifest['tokens']} tokens"
    if not isinstance(manifest.get("model"), str) or not isinstance(manifest.get("tokenizer", ""), str):
        return "the fingerprint of the model or of the tokenizer is no text"
    files = manifest.get("files")
    if not isinstance(files, list) or not files:
        return "files is no list of files"
    for rank, entry in enumerate(files):
        if not isinstance(entry, dict) or entry.get("name") != keys_name(rank, len(files)):
            return f"{entry!r} is not the file of rank {rank} of {len(files)}, {keys_name(rank, len(files))}"
        if not is_whole(entry.get("places")) or entry["places"] < 0:
            return f"{entry['name']} has no number of places"
    for name, found in ((TOKENS, manifest.get("sha256")), *((each["name"], each.get("sha256")) for each in files)):
        if not is_digest(found):
            return f"{name} has no digest sha256"
    return None


def read_tokens(folder: Path, manifest: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask), both (B, tokens) long.

    Raises:
        ValueError: the file is missing, is not the one that was saved, or holds something else; the message names it.
    """
    path, shape = folder / TOKENS, (manifest["batch"], manifest["tokens"])
    with tensors_in(path, manifest["sha256"], MANIFEST) as handle:
        found = [handle.get_tensor(name) for name in ("input_ids", "attention_mask")]
    if any(tensor.dtype != torch.long or tuple(tensor.shape) != shape for tensor in found):
        raise ValueError(f"{path} is damaged: input_ids and attention_mask of {shape} integers are needed.")
    return found[0], found[1]


def read_places(folder: Path, manifest: dict[str, Any], wanted: range) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Columns, and keys and values of every layer, of a run of places; only their part of each file is read.

    Args:
        folder, manifest: of the conversation.
        wanted: the places; may be empty.

    Returns:
        (B, S) long, and for each layer (B, Hkv, S, D) and (B, Hkv, S, Dv).

    Raises:
        ValueError: a file is missing, is not the one that was saved, or holds something else; the message names it.
    """
    parts, first = [], 0
    for entry in manifest["files"]:
        begin, end = (min(max(edge - first, 0), entry["places"]) for edge in (wanted.start, wanted.stop))
        first += entry["places"]
        if begin < end:
            parts.append(_part(folder / entry["name"], entry, manifest, begin, end))
    if not parts:
        entry = manifest["files"][0]
        parts.append(_part(folder / entry["name"], entry, manifest, 0, 0))
    columns = torch.cat([part[0] for part in parts], 1)
    facts = [[(x.dtype, *x.shape[:2], x.shape[3]) for x in part[1:]] for part in parts]
    if any(each != facts[0] for each in facts):
        raise ValueError(f"{folder} is damaged: the files of its ranks do not fit each other.")
    joined = [torch.cat(tensors, 2) for tensors in zip(*(part[1:] for part in parts), strict=True)]
    return columns, list(zip(joined[::2], joined[1::2], strict=True))


def _part(path: Path, entry: dict[str, Any], manifest: dict[str, Any], begin: int, end: int) -> list[Tensor]:
    """Places begin .. end-1 of one file: columns, key.0, value.0, key.1, ..."""
    batch, places = manifest["batch"], entry["places"]
    names = [f"{kind}.{layer}" for layer in range(manifest["layers"]) for kind in ("key", "value")]
    with tensors_in(path, entry["sha256"], MANIFEST) as handle:
        if set(handle.keys()) != {"columns", *names}:
            raise ValueError(f"{path} is damaged: columns, keys and values of {manifest['layers']} layers are needed.")
        for name in ("columns", *names):
            shape = tuple(handle.get_slice(name).get_shape())
            lead = shape if name == "columns" else (shape[:1] + shape[2:3] if len(shape) == 4 else ())
            if lead != (batch, places):
                raise ValueError(f"{path} is damaged: {name} is {shape}, {batch} rows and {places} places are needed.")
        found = [handle.get_slice("columns")[:, begin:end], *(handle.get_slice(n)[:, :, begin:end] for n in names)]
    columns = found[0]
    if columns.dtype != torch.long or bool((columns < -1).any()) or bool((columns >= manifest["length"]).any()):
        raise ValueError(f"{path} is damaged: its columns are not -1 .. {manifest['length'] - 1}.")
    for name, tensor in zip(names, found[1:], strict=True):
        if not tensor.is_floating_point():
            raise ValueError(f"{path} is damaged: {name} is {tensor.dtype}, no floating-point numbers.")
    return found
