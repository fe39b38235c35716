"""A key-value cache sharded over the ranks: it counts the tokens of all ranks and stores the keys of this rank only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from hf_attn_plugins.hf.compat import dynamic_layer, grow_layers
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.method import Layout, Step, local_columns
from hf_attn_plugins.parallel.partition import level

DynamicLayer: Any = dynamic_layer()


class ShardedLayer(DynamicLayer):  # type: ignore[misc]
    """The keys (B, Hkv, S, D) and values (B, Hkv, S, Dv) of one layer that this rank stores."""

    keys: Any
    values: Any

    def __init__(self, cache: ShardedCache) -> None:
        super().__init__()
        self.cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store this rank's part of new keys and values, as the cache's current `Step` says.

        Args:
            key_states, value_states: (B, Hkv, T, D) and (B, Hkv, T, Dv), one per slot of this forward.

        Returns:
            the keys and values that attention gets. For a sharded prompt these are all T slots of this forward; for
            later tokens, all keys that this rank stores.
        """
        step, stored = self.cache.current, self.cache.stored
        own_key, own_value = key_states[:, :, stored], value_states[:, :, stored]
        if self.keys is None or self.values is None:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values = own_key, own_value
        else:
            self.keys, self.values = torch.cat([self.keys, own_key], 2), torch.cat([self.values, own_value], 2)
        return (key_states, value_states) if step.is_prompt else (self.keys, self.values)

    def get_seq_length(self) -> int:
        """Columns of the prompt so far, on all ranks together."""
        return self.cache.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(keys that `update` returns in this forward, 0)."""
        return self.cache.visible, 0

    def select(self, index: Tensor, dim: int) -> None:
        """Keep the entries `index` of dimension `dim`: 0 for batch rows, 2 for keys."""
        if self.keys is not None and self.values is not None:
            self.keys = self.keys.index_select(dim, index.to(self.keys.device))
            self.values = self.values.index_select(dim, index.to(self.values.device))


class ShardedCache(DynamicCache):
    """The cache of a model inside `context_parallel`. Its layers are `ShardedLayer`s.

    Attributes:
        length: columns of the prompt so far, on all ranks together; `get_seq_length()` returns it.
        columns: (B, S) long, the column of each key that this rank stores; -1 for padding.
        loads: keys per batch row that each rank stores.
        gaps: whether a column so far was padding.
        stored: the slots of the current forward that this rank stores, as a slice or a long tensor.
        visible: keys that `ShardedLayer.update` returns in the current forward.
        group: the ranks.
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
        """The forward under way.

        Raises:
            RuntimeError: there is none: the cache was used outside of `context_parallel`.
        """
        if self._step is None:
            raise RuntimeError("a ShardedCache grows inside `with context_parallel(...)` only: call the model there.")
        return self._step

    def begin(
        self, real: Tensor, layout: Layout | None, texts: Tensor | None = None, packed_in: Tensor | None = None
    ) -> Step:
        """Start a forward over T new columns: decide which of them this rank stores.

        Args:
            real: (B, T) bool on the model's device, False for padding.
            layout: the layout of a sharded prompt or of a dealt later turn; None for rows that every rank computes.
            texts, packed_in: see `Step`.

        Returns:
            the forward, also as `current` until `finish`.
        """
        device, count = real.device, real.shape[1]
        if layout is not None:
            rows = local_columns(real, layout.columns.to(device))
            stored: Any = layout.stored.to(device)
            added, fresh = layout.loads, layout.fresh
        else:
            rows = local_columns(real, torch.arange(count, device=device).expand(len(real), -1))
            shares = level(self.loads, count)
            own = shares[self.group.rank]
            stored = slice(own.start, own.stop)
            added, fresh = [len(share) for share in shares], (own,)
        rows = torch.where(rows < 0, rows, rows + self.length)
        keys = rows[:, stored]
        self.loads = [load + more for load, more in zip(self.loads, added, strict=True)]
        self.gaps = self.gaps or bool((rows < 0).any())
        self.columns = keys if self.columns is None else torch.cat([self.columns, keys], 1)
        self.stored = stored
        is_prompt = layout is not None and self.length == 0
        self.visible = rows.shape[1] if is_prompt else self.columns.shape[1]
        held = None if is_prompt else self.columns
        self._step = Step(self.length, rows, layout, held, self.gaps, fresh, texts, packed_in)
        return self._step

    def finish(self, count: int) -> None:
        """End the forward over `count` new columns."""
        self.length += count
        self._step = None

    def restore(self, length: int, loads: list[int], columns: Tensor, layers: list[tuple[Tensor, Tensor]]) -> None:
        """Fill an empty cache with keys that were stored before.

        Args:
            length, loads, columns: see the attributes.
            layers: (B, Hkv, S, D) and (B, Hkv, S, Dv) of each layer, not copied.
        """
        self.length, self.loads, self.columns, self.gaps = length, list(loads), columns, bool((columns < 0).any())
        for key, value in layers:
            layer = ShardedLayer(self)
            layer.keys, layer.values = key, value
            layer.dtype, layer.device, layer.is_initialized = key.dtype, key.device, True
            self.layers.append(layer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of the prompt so far, on all ranks together; the same for every layer."""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """(keys that `ShardedLayer.update` returns in this forward, 0); the same for every layer."""
        return self.visible, 0

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values that this rank stores."""
        stored = [x for layer in self._shards for x in (layer.keys, layer.values) if x is not None]
        return sum(x.numel() * x.element_size() for x in stored)

    @property
    def _shards(self) -> list[ShardedLayer]:
        return self.layers  # type: ignore[return-value]

    def crop(self, tokens_to_remove: int) -> None:
        """Remove columns from the end, as `DynamicCache.crop`: a negative n removes the last -n, a positive n keeps n.

        Every rank must call it: the ranks exchange their new loads. Example: after 10 columns, crop(-3) and crop(7)
        both keep columns 0 .. 6.
        """
        length = self.length + tokens_to_remove if tokens_to_remove <= 0 else min(self.length, tokens_to_remove)
        if self.columns is None or length >= self.length:
            return
        self.length = max(0, length)
        self.columns = torch.where(self.columns < self.length, self.columns, -1)
        self._keep((self.columns >= 0).any(0).nonzero()[:, 0], 1)
        self.loads = self.group.objects(self.columns.shape[1], what="crop")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace batch row i by row beam_idx[i] (beam search)."""
        self._keep(beam_idx, 0)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these batch rows: a bool mask or indices."""
        self._keep(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices, 0)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every batch row `repeats` times: 0, 0, 1, 1 for 2 rows and repeats=2."""
        if self.columns is not None:
            self._keep(torch.arange(len(self.columns)).repeat_interleave(repeats), 0)

    def reset(self) -> None:
        """Empty the cache."""
        self.__init__(self.group)  # type: ignore[misc]

    def _keep(self, index: Tensor, dim: int) -> None:
        if self.columns is None:
            return
        self.columns = self.columns.index_select(dim, index.to(self.columns.device))
        for layer in self._shards:
            layer.select(index, 2 if dim else 0)
