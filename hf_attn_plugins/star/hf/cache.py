"""Star caches: ordinary Transformers caches that also know what they were encoded from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_attn_plugins.hf.compat import dynamic_layer, grow_layers
from hf_attn_plugins.star.plan import Plan
from hf_attn_plugins.ui.shown import Shown

Layers = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Record:
    """What a star cache holds, kept in its attribute `star`.

    Attributes:
        context_ids: (B, L) token ids of the context, on the CPU.
        block_size, anchor_size: as in `Plan`.
        max_length: positions that the rotary frequencies were frozen for (matters to `dynamic` and `longrope` only).
        model: fingerprint of the model that encoded it.
        halo_size: as in `Plan`.
        dense_heads: key heads that see everything before them, as in `StarOptions`; None for none.
    """

    context_ids: Tensor
    block_size: int
    anchor_size: int
    max_length: int
    model: str
    halo_size: int = 0
    dense_heads: tuple[tuple[int, ...], ...] | None = None

    @property
    def length(self) -> int:
        return self.context_ids.shape[1]

    @property
    def plan(self) -> Plan:
        """The plan of the context, without a query."""
        return Plan(self.length, self.block_size, self.anchor_size, halo_size=self.halo_size)

    @property
    def heads_differ(self) -> bool:
        """Whether some heads see what the plan hides from others."""
        return self.dense_heads is not None and not self.plan.is_dense

    @property
    def options(self) -> dict[str, Any]:
        """The same as options of `star_attention`."""
        return {
            "block_size": self.block_size,
            "anchor_size": self.anchor_size,
            "halo_size": self.halo_size,
            "query_size": 0,
            "dense_heads": self.dense_heads,
        }


DynamicLayer: Any = dynamic_layer()


class StarLayer(DynamicLayer):
    """Keys and values of one layer; they are repeated when beams or samples make more rows of one context."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.keys.ndim == 4 and (copies := len(key_states) // len(self.keys)) > 1:
            self.batch_repeat_interleave(copies)
        return super().update(key_states, value_states, *args, **kwargs)


class StarCache(Shown, DynamicCache):
    """A `DynamicCache` without sliding layers: the mask cuts windows, so that cropping and branching stay possible.

    Attributes:
        star: what was encoded, or None while it is being encoded.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], record: Record | None = None) -> None:
        super().__init__()
        grow_layers(self, StarLayer)
        self.star = record
        for index, (key, value) in enumerate(layers):
            # A first update without tokens sets the layer up, the tensors themselves are not copied.
            self.update(key[:, :, :0], value[:, :, :0], index)
            layer: Any = self.layers[index]
            layer.keys, layer.values = key, value

    def __str__(self) -> str:
        layers: list[Any] = [layer for layer in self.layers if getattr(layer, "keys", None) is not None]
        held = sum(x.numel() * x.element_size() for layer in layers for x in (layer.keys, layer.values))
        size = f"{len(layers)} layers, {held / 2**20:.1f} MiB of keys and values"
        if self.star is None:
            return f"StarCache being encoded: {size}"
        plan, rows = self.star.plan, self.star.context_ids.shape[0]
        tokens = f"{self.star.length} tokens" + (f" x {rows} rows" if rows > 1 else "")
        heads = sum(map(len, self.star.dense_heads or ()))
        later = max(0, (layers[0].keys.shape[-2] if layers else 0) - self.star.length)
        return (
            f"StarCache: {tokens} in {plan.num_blocks} blocks of {plan.block_size}, anchor {len(plan.anchor)}, "
            f"halo {plan.halo_size}{f', {heads} dense heads' if heads else ''}; {later} tokens behind them; {size}"
        )

    __repr__ = __str__


def cache_of(layers: Layers, record: Record | None = None) -> Any:
    """A `StarCache` of (key, value) of each layer, (B, Hkv, L, D) and (B, Hkv, L, Dv), which are not copied."""
    return StarCache(layers, record)


def layers_of(cache: Any, length: int | None = None) -> Layers:
    """Views of the first `length` tokens (all when None) of each layer's keys and values."""
    return [(layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in cache.layers]


def record_of(cache: Any) -> Record:
    """The record of a cache that `encode` or `load` made.

    Raises:
        ValueError: another cache.
    """
    record = getattr(cache, "star", None)
    if not isinstance(record, Record):
        raise ValueError("this cache has no record of a context: pass one that star.encode() or star.load() returned.")
    return record


def branch(cache: Any, copies: int = 1) -> Any:
    """A second cache over the same context, for a question of its own; the tensors are shared until it grows.

    Args:
        cache: a star cache, which may have grown by questions and answers: they are left out.
        copies: rows of the batch that each row becomes.
    """
    record = record_of(cache)
    layers = layers_of(cache, record.length)
    if copies > 1:
        layers = [(_repeated(key, copies), _repeated(value, copies)) for key, value in layers]
    return cache_of(layers, record)


def _repeated(tensor: Tensor, copies: int) -> Tensor:
    if tensor.shape[0] == 1:
        return tensor.expand(copies, -1, -1, -1)
    return tensor.repeat_interleave(copies, 0)


def as_ids(tokens: Tensor | Sequence[int] | Sequence[Sequence[int]], name: str) -> Tensor:
    """Token ids as a (B, T) integer tensor on the CPU.

    Raises:
        ValueError: no integers, or neither one row nor rows of one length.
    """
    ids = torch.as_tensor(tokens).detach().cpu()
    ids = ids.unsqueeze(0) if ids.ndim == 1 else ids
    if ids.numel() == 0:
        ids = ids.long()
    if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(
            f"{name} must be token ids of shape (tokens,) or (batch, tokens), got {tuple(ids.shape)} {ids.dtype}."
        )
    return ids.long()
