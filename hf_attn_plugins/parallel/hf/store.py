"""Conversations on disk: every rank writes the keys that it stores, and any number of ranks reads them again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hf_attn_plugins.core.files import digest
from hf_attn_plugins.core.staging import put, sweep
from hf_attn_plugins.parallel.comm.consistency import agree, same_random_state, together
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.hf import conversation
from hf_attn_plugins.parallel.hf.cache import ShardedCache
from hf_attn_plugins.parallel.hf.conversation import FORMAT, KEYS, MANIFEST, TOKENS, keys_name
from hf_attn_plugins.parallel.hf.weights import is_sharded
from hf_attn_plugins.parallel.partition import contiguous
from hf_attn_plugins.star.hf.fingerprint import fingerprint, tokenizer_fingerprint

Layers = list[tuple[Tensor, Tensor]]


class Saved(NamedTuple):
    """A conversation that was loaded.

    Attributes:
        cache: the keys and values so far, to be passed as the model's cache.
        input_ids, attention_mask: (B, L) long, all tokens so far; the cache may lack the last ones.
    """

    cache: Any
    input_ids: Tensor
    attention_mask: Tensor


def save(
    model: nn.Module,
    group: Group,
    cache: Any,
    folder: str | Path,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    tokenizer: Any = None,
) -> None:
    """See `Session.save`. The manifest is written last, so that a folder with a manifest is complete."""
    folder = Path(folder)
    held: list[Any] = []

    def prepare() -> tuple[int, int, dict[str, Any]]:
        """(tokens that this rank has keys of, tokens of the mask, what the manifest says)."""
        length, columns, layers = _stored(cache, group)
        ids, mask = _tokens(input_ids, attention_mask, len(layers[0][0]), length)
        here = _columns(columns, mask, length)
        hidden = (here >= 0) & (mask.gather(1, here.clamp_min(0)) == 0)
        if bool(hidden.any()):
            row, place = hidden.nonzero()[0].tolist()
            raise ValueError(
                f"attention_mask calls token {int(here[row, place])} of row {row} padding, and the cache has its key: "
                "pass the mask of the prompt, extended by ones."
            )
        held.extend((ids, mask, here, layers))
        if group.rank == 0:
            _begin(folder)
        facts: dict[str, Any] = {"model": _fingerprint(model), "batch": len(ids), "length": length}
        facts |= {"tokens": ids.shape[1], "layers": len(layers)}
        if tokenizer is not None:
            facts["tokenizer"] = tokenizer_fingerprint(tokenizer)
        return int((here >= 0).sum()), int(mask[:, :length].sum()), facts

    found = together(group, prepare, what="save")
    kept, due, facts = sum(count for count, _, _ in found), *found[0][1:]
    if kept != due:
        raise ValueError(
            f"the cache has keys of {kept} tokens and attention_mask has {due} tokens: pass the mask of the prompt, "
            "extended by ones."
        )

    def write() -> dict[str, Any]:
        from safetensors.torch import save_file

        ids, mask, here, layers = held
        tensors = {"columns": here}
        for index, pair in enumerate(layers):
            tensors |= {f"{kind}.{index}": x.contiguous() for kind, x in zip(("key", "value"), pair, strict=True)}
        path = folder / keys_name(group.rank, group.size)
        put(path, lambda name: save_file(tensors, name))
        entry = {"name": path.name, "places": here.shape[1], "sha256": digest(path)}
        if group.rank == 0:
            put(folder / TOKENS, lambda name: save_file({"input_ids": ids, "attention_mask": mask}, name))
            entry["tokens"] = digest(folder / TOKENS)
        return entry

    entries = together(group, write, what="save")

    def finish() -> None:
        if group.rank == 0:
            manifest = {"format": FORMAT, **facts, "sha256": entries[0].pop("tokens"), "files": entries}
            text = json.dumps(manifest, indent=1)
            put(folder / MANIFEST, lambda name: name.write_text(text, encoding="utf-8"))

    together(group, finish, what="save")


def load(model: nn.Module, group: Group, folder: str | Path, *, tokenizer: Any = None, sharded: bool = True) -> Saved:
    """See `Session.load`; `sharded` says whether the session's hooks are on the model, which need a `ShardedCache`."""
    folder = Path(folder)
    manifest = together(group, lambda: _manifest(folder, model, tokenizer), what="load")[group.rank]
    agree(group, {MANIFEST: json.dumps(manifest, sort_keys=True)}, what="folders")
    counts = [entry["places"] for entry in manifest["files"]]
    shares = contiguous(sum(counts), group.size)
    if len(counts) == group.size:  # every rank reads the file that it wrote
        shares = [range(sum(counts[:rank]), sum(counts[: rank + 1])) for rank in range(group.size)]
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    read: list[Any] = []

    def check() -> tuple[Any, list[int]]:
        """What the ranks' parts have in common, and the number of tokens in each batch row of this one."""
        ids, mask = conversation.read_tokens(folder, manifest)
        vocabulary = embedding.weight.shape[0]
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary or not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError(f"{folder / TOKENS} is damaged: ids 0 .. {vocabulary - 1} and a mask of 0, 1 are needed.")
        columns, layers = conversation.read_places(folder, manifest, shares[group.rank])
        real = columns >= 0
        if bool((real & (mask.gather(1, columns.clamp_min(0)) == 0)).any()):
            raise ValueError(f"{folder} is damaged: its ranks have keys of tokens that {TOKENS} calls padding.")
        read.extend((ids, mask, columns, layers))
        return [(str(x.dtype), *x.shape[:2], x.shape[3]) for pair in layers for x in pair], real.sum(1).tolist()

    found = together(group, check, what="load")
    ids, mask, columns, layers = read
    tokens = [sum(row) for row in zip(*(counts for _, counts in found), strict=True)]
    if any(facts != found[0][0] for facts, _ in found) or tokens != mask[:, : manifest["length"]].sum(1).tolist():
        raise ValueError(f"{folder} is damaged: the files of its ranks do not make one cache together.")
    device = embedding.weight.device
    columns, layers = columns.to(device), [(key.to(device), value.to(device)) for key, value in layers]
    if sharded:
        cache: Any = ShardedCache(group)
        cache.restore(manifest["length"], [len(share) for share in shares], columns, layers)
        if group.size > 1:
            same_random_state(group)  # a prompt does it otherwise
    else:
        cache = _in_order(manifest["length"], columns, layers)
    return Saved(cache, ids.to(device), mask.to(device))


def _manifest(folder: Path, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    manifest = conversation.read_manifest(folder)
    if manifest["model"] != _fingerprint(model):
        raise ValueError(f"{folder} was saved with another model (config or weights differ): read the prompt again.")
    if tokenizer is not None and "tokenizer" in manifest and manifest["tokenizer"] != tokenizer_fingerprint(tokenizer):
        raise ValueError(f"{folder} was saved with another tokenizer: token ids would mean other words.")
    return manifest


def _fingerprint(model: nn.Module) -> str:
    if is_sharded(model):
        raise NotImplementedError(
            "the weights are sharded, so that no rank can tell which model this is: use whole weights."
        )
    return fingerprint(model)


def _begin(folder: Path) -> None:
    """Make the folder, and remove what a save that was killed has left there."""
    if (folder / MANIFEST).exists():
        raise ValueError(f"{folder} holds a conversation already: name another folder, or remove it.")
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    for path in folder.iterdir():
        if KEYS.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _stored(cache: Any, group: Group) -> tuple[int, Tensor | None, Layers]:
    """(tokens of the cache, columns of this rank's keys or None for all of them, keys and values of each layer)."""
    layers: Any = getattr(cache, "layers", None)
    if isinstance(cache, ShardedCache):
        if cache.columns is None or (cache.group.rank, cache.group.size) != (group.rank, group.size):
            raise ValueError(
                f"this cache is empty, or of another launch: it has {cache.length} tokens on {cache.group.size} ranks."
            )
        return cache.length, cache.columns, [(layer.keys, layer.values) for layer in layers]
    if group.size > 1 or not layers:
        raise ValueError(f"save() got a {type(cache).__name__}: pass the cache that the model returned here.")
    length = cache.get_seq_length()
    for index, layer in enumerate(layers):
        if not length or layer.keys.shape[2] != length:
            raise NotImplementedError(
                f"layer {index} of this {type(cache).__name__} has not kept exactly its {length} tokens: start the "
                "conversation with past_key_values=transformers.DynamicCache(), which keeps all keys, and save that."
            )
    return length, None, [(layer.keys, layer.values) for layer in layers]


def _tokens(input_ids: Tensor, attention_mask: Tensor | None, batch: int, length: int) -> tuple[Tensor, Tensor]:
    """The token ids and the mask as they are written, checked against a cache of `length` columns."""
    ids = torch.as_tensor(input_ids).detach().cpu()
    if ids.ndim != 2 or ids.is_floating_point() or len(ids) != batch or ids.shape[1] < length:
        raise ValueError(
            f"input_ids must be token ids of shape ({batch}, {length} or more), as the cache has {length} tokens in "
            f"{batch} rows; got {tuple(ids.shape)} {ids.dtype}."
        )
    mask = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask).detach().cpu()
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask is {tuple(mask.shape)}, input_ids are {tuple(ids.shape)}: extend it by ones.")
    return ids.long().contiguous(), mask.bool().long().contiguous()


def _columns(columns: Tensor | None, mask: Tensor, length: int) -> Tensor:
    """(B, S) the columns of this rank's keys, on the CPU; those of one process by its mask, -1 for padding."""
    if columns is None:
        return torch.where(mask[:, :length] == 1, torch.arange(length), -1)
    return columns.cpu().contiguous()


def _in_order(length: int, columns: Tensor, layers: Layers) -> DynamicCache:
    """The cache of one process: keys and values in the order of the columns, zeros at padding that nobody stored."""
    row, place = (columns >= 0).nonzero(as_tuple=True)
    cache = DynamicCache()
    for index, pair in enumerate(layers):
        whole = [x.new_zeros(*x.shape[:2], length, x.shape[3]) for x in pair]
        for target, x in zip(whole, pair, strict=True):
            target[row, :, columns[row, place]] = x[row, :, place]
        cache.update(whole[0], whole[1], index)
    return cache
