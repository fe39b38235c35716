"""A cache of which every rank holds a part: it counts all tokens, and keeps the keys and values of its own.

It stands beside the folder `parallel/` because it needs Transformers' classes to derive from.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_attn_plugins.hf.compat import dynamic_layer, grow_layers
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.method import Layout, Step
from hf_attn_plugins.parallel.partition import level

DynamicLayer: Any = dynamic_layer()


class ShardedLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of one layer on this rank, (B, Hkv, S, D) and (B, Hkv, S, Dv)."""

    keys: Any
    values: Any

    def __init__(self, cache: ShardedCache) -> None:
        super().__init__()
        self.cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keep what this rank stores; return what its rows need: a sharded prompt's own slots, else the shard."""
        step, stored = self.cache.current, self.cache.stored
        own_key, own_value = key_states[:, :, stored], value_states[:, :, stored]
        if self.keys is None or self.values is None:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = own_key, own_value
        else:
            self.keys, self.values = torch.cat([self.keys, own_key], 2), torch.cat([self.values, own_value], 2)
        return (key_states, value_states) if step.layout is not None else (self.keys, self.values)

    def get_seq_length(self) -> int:
        return self.cache.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.visible, 0

    def select(self, index: Tensor, dim: int) -> None:
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(dim, index.to(self.keys.device))
            self.values = self.values.index_select(dim, index.to(self.values.device))


class ShardedCache(DynamicCache):
    """The cache that a model gets inside `context_parallel`.

    Attributes:
        length: columns seen so far, on all ranks together: what `get_seq_length()` gives.
        columns: (B, S) long, the column of every key on this rank, -1 for padding.
        loads: keys (per row of the batch) that each rank stores.
        group: the ranks that hold its shards.
    """

    def __init__(self, group: Group) -> None:
        super().__init__()
        grow_layers(self, lambda: ShardedLayer(self))
        self.group = group
        self.length, self.loads, self.gaps = 0, [0] * group.size, False
        self.columns: Tensor | None = None
        self._step: Step | None = None
        self.stored: Any = slice(0, 0)
        self.visible = 0

    @property
    def current(self) -> Step:
        if self._step is None:
            raise RuntimeError("this cache grows inside `with context_parallel(...)` only: use it there.")
        return self._step

    def begin(self, real: Tensor, layout: Layout | None) -> Step:
        """Make room for a forward over new columns.

        Args:
            real: (B, T) bool on the model's device, False for padding.
            layout: of a sharded prompt, or None for rows that every rank computes.
        """
        device, fresh = real.device, range(0)
        if layout is not None:
            rows = layout.columns.to(device)
            stored: Any = layout.stored.to(device)
            keys, self.loads = rows[:, stored], list(layout.loads)
            self.visible = rows.shape[1]
        else:
            count = real.shape[1]
            rows = torch.where(real, torch.arange(self.length, self.length + count, device=device), -1)
            shares = level(self.loads, count)
            self.loads = [load + len(share) for load, share in zip(self.loads, shares, strict=True)]
            fresh = shares[self.group.rank]
            stored = slice(fresh.start, fresh.stop)
            keys = rows[:, stored]
            self.visible = keys.shape[1] + (0 if self.columns is None else self.columns.shape[1])
        self.gaps = self.gaps or bool((rows < 0).any())
        self.columns = keys if self.columns is None else torch.cat([self.columns, keys], 1)
        self.stored = stored
        self._step = Step(self.length, rows, layout, None if layout is not None else self.columns, self.gaps, fresh)
        return self._step

    def finish(self, count: int) -> None:
        """The forward over `count` new columns is done."""
        self.length += count
        self._step = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.visible, 0

    @property
    def bytes(self) -> int:
        """Bytes of keys and values on this rank."""
        held = [x for layer in self._shards for x in (layer.keys, layer.values) if x is not None]
        return sum(x.numel() * x.element_size() for x in held)

    @property
    def _shards(self) -> list[ShardedLayer]:
        return self.layers  # type: ignore[return-value]

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -n columns for a negative n, all but the first n for a positive one."""
        length = self.length + tokens_to_remove if tokens_to_remove <= 0 else min(self.length, tokens_to_remove)
        if self.columns is None or length >= self.length:
            return
        self.length = max(0, length)
        self.columns = torch.where(self.columns < self.length, self.columns, -1)
        self._keep((self.columns >= 0).any(0).nonzero()[:, 0], 1)
        self.loads = self.group.objects(self.columns.shape[1], what="crop")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._keep(beam_idx, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._keep(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices, 0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.columns is not None:
            self._keep(torch.arange(len(self.columns)).repeat_interleave(repeats), 0)

    def reset(self) -> None:
        self.__init__(self.group)  # type: ignore[misc]

    def _keep(self, index: Tensor, dim: int) -> None:
        if self.columns is None:
            return
        self.columns = self.columns.index_select(dim, index.to(self.columns.device))
        for layer in self._shards:
            layer.select(index, 2 if dim else 0)
