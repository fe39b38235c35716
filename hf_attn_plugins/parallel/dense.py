"""Dense attention with sharded keys: all ranks have equal causal work, and gather the keys of one layer at a time.

Gathering keys and values moves 2 x Hkv x D elements per token. Sending queries to the keys and partial results back
would move Hq x (2 D + 1) elements per token, which is more because Hq >= Hkv. The gathered keys of a layer are freed
after that layer; the cache keeps the shard only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask, Window
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.cqs.cost import CallShape
from hf_attn_plugins.kernels.bound_attend import BoundAttend
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.method import Cost, Layout, Step, triangle
from hf_attn_plugins.parallel.partition import mirrored
from hf_attn_plugins.tiled.options import TiledOptions


@dataclass(frozen=True)
class Dense(TiledOptions):
    """`tiled_attention` on several ranks: exact, forward only."""

    trains = False

    def deal(self, real: Tensor, rank: int, size: int) -> Layout | None:
        """See `Method.deal`: two runs of tokens per rank (`partition.mirrored`)."""
        count = real.shape[1]
        dealt = mirrored(count, size)
        if not all(dealt):
            return None
        loads = [sum(map(len, runs)) for runs in dealt]
        columns = torch.cat([torch.arange(run.start, run.stop) for run in dealt[rank]])
        slots = torch.arange(len(columns))
        return Layout(columns.expand(len(real), -1), slots, slots, loads, extra=(dealt, real))

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, window: Window, step: Step, kernel: BoundAttend, group: Group
    ) -> Partial:
        """Gather this layer's keys and values, then attend run by run."""
        assert step.layout is not None
        dealt, real = step.layout.extra
        keys, values = (self._whole(x, dealt, step.layout.loads, group) for x in (key, value))
        padding = None if bool(real.all()) else real.to(query.device)
        parts, start = [], 0
        for run in dealt[group.rank]:
            rows = query[:, :, start : start + len(run)]
            mask = Mask(causal=True, window=window, offset=run.start, key_padding=padding)
            parts.append(kernel(rows, keys, values, mask))
            start += len(run)
        return Partial.cat(parts)

    def settle(self, config: Mapping[str, Any], group: Group) -> Dense:
        """Return self: no field depends on the model."""
        return self

    def cost(self, layout: Layout, rank: int, shape: CallShape) -> Cost:
        """Every shard is sent padded to the length of the longest one."""
        runs, size, load = layout.extra[0][rank], len(layout.loads), layout.loads[rank]
        num_tokens = layout.extra[1].shape[1]
        moved = (size - 1) * max(layout.loads) * shape.key_bytes
        return Cost(
            sent=moved,
            received=moved,
            held=load * (shape.query_bytes + shape.result_bytes) + (load * (size > 1) + num_tokens) * shape.key_bytes,
            pairs=sum(triangle(run.stop) - triangle(run.start) for run in runs),
            rows=load,
            cache=load * shape.key_bytes,
            decode=(size - 1) * shape.result_bytes,
        )

    @staticmethod
    def _whole(own: Tensor, dealt: list[list[range]], loads: list[int], group: Group) -> Tensor:
        """The keys or values of all ranks, (B, H, L, D), in the order of the columns."""
        shards = group.all_gather(own, loads, 2, what="keys and values")
        runs = []
        for shard, ranges in zip(shards, dealt, strict=True):
            pieces = shard.split([len(run) for run in ranges], 2)
            runs += list(zip((run.start for run in ranges), pieces, strict=True))
        return torch.cat([piece for _, piece in sorted(runs, key=lambda pair: pair[0])], 2)
