"""What a forward inside `context_parallel` is given: its arguments, its padding, its texts and its cache, checked."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from hf_attn_plugins.hf.compat import NAMES
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.hf.cache import ShardedCache

HARMLESS = {"return_dict", "cache_position", "logits_to_keep", "labels", "num_items_in_batch", "output_attentions"}
OWN = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", *NAMES, "use_cache"}


def arguments_of(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the decoder's forward by name.

    Raises:
        NotImplementedError: a tensor that belongs to tokens and cannot be divided, or an output of all layers.
    """
    given: dict[str, Any] = {}
    for name, value in signature.bind_partial(*args, **kwargs).arguments.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            given.update(value)
        else:
            given[name] = value
    for name, value in given.items():
        if name in OWN or value is None or name in HARMLESS:
            continue
        if isinstance(value, Tensor) or (name.startswith("output_") and value):
            raise NotImplementedError(
                f"context_parallel does not know how to cut {name!r} into shards: leave it out, or run this call "
                "outside of context_parallel."
            )
    return given


def cache_for(past: Any, group: Group) -> ShardedCache:
    """The sharded cache that a forward goes on with: the one it was given, or a new one.

    Raises:
        ValueError: a cache of another kind that holds tokens, or a sharded one of another number of ranks.
    """
    if isinstance(past, ShardedCache):
        if (past.group.rank, past.group.size) != (group.rank, group.size):
            raise ValueError(
                f"this cache has its shards on {past.group.size} ranks, and this launch has {group.size}: save it "
                "there, session.save(...), and load it here, session.load(...)."
            )
        past.group = group
        return past
    if past is None or (isinstance(past, DynamicCache) and past.get_seq_length() == 0 and type(past) is DynamicCache):
        return ShardedCache(group)
    raise ValueError(
        f"context_parallel keeps keys in a cache of its own and got a {type(past).__name__} of "
        f"{past.get_seq_length()} tokens: pass no cache (and no cache_implementation), or one it returned."
    )


def real_tokens(mask: Any, inputs: Tensor, first: int) -> Tensor:
    """(B, T) bool, False for padding, of the T tokens of a forward behind `first` columns.

    Raises:
        ValueError: a mask of another shape than (B, first + T).
    """
    batch, count = inputs.shape[:2]
    if mask is None:
        return torch.ones(batch, count, dtype=torch.bool, device=inputs.device)
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != first + count:
        shape = tuple(mask.shape) if hasattr(mask, "shape") else type(mask).__name__
        raise ValueError(
            f"context_parallel takes an attention mask of shape (batch, {first + count}), for every token so far, "
            f"got {shape}."
        )
    return mask[:, first:].bool()


def texts_of(positions: Tensor, *, with_cache: bool) -> Tensor | None:
    """(B, L) the number of each column's text, where `positions` (B, L) start anew; None if they do not.

    Transformers, too, reads packed texts from positions only if the call makes no cache.

    Raises:
        NotImplementedError: packed texts with a cache.
    """
    starts = positions.diff(dim=1) != 1
    if not bool(starts.any()):
        return None
    if with_cache:
        raise NotImplementedError(
            "position_ids that start anew mean packed texts, which context_parallel does not cut into shards "
            "with a cache: pass use_cache=False."
        )
    return nn.functional.pad(starts.cumsum(1), (1, 0))


def take(tensor: Tensor, columns: Tensor) -> Tensor:
    """The entries (B, T, ...) of `tensor` (B, L, ...) at `columns` (B, T); an arbitrary entry where a column is -1."""
    index = columns.clamp_min(0).to(tensor.device)
    if tensor.ndim == 2:
        return tensor.gather(1, index)
    return tensor.gather(1, index.unsqueeze(-1).expand(-1, -1, tensor.shape[2]))
