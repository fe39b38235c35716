"""Dense attention over sharded tokens: all ranks have equal causal work, and exchange keys or heads in every layer.

"gather": every rank gathers the keys and values of one layer, 2 x Hkv x D elements per token. Sending queries to the
keys and partial results back would move Hq x (2 D + 1) elements per token, which is more because Hq >= Hkv. The
gathered keys of a layer are freed after that layer; the cache keeps the shard only. Without gradients a rank attends
to its own keys while the others' are on their way. "heads": every rank gets all tokens
of some heads (`heads.attention`), which moves less with many ranks or many key heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask, Window
from hf_attn_plugins.core.partial import Partial, merge
from hf_attn_plugins.cqs.planning.cost import CallShape
from hf_attn_plugins.kernels.bound_attend import BoundAttend
from hf_attn_plugins.parallel import heads
from hf_attn_plugins.parallel.comm.collectives import tie
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.method import Cost, Layout, Step, triangle
from hf_attn_plugins.parallel.partition import mirrored
from hf_attn_plugins.tiled.options import TiledOptions

EXCHANGES = ("auto", "gather", "heads")


@dataclass(frozen=True)
class Dense(TiledOptions):
    """`tiled_attention` on several ranks: exact, forward and backward.

    Attributes:
        exchange: what the ranks exchange in every layer: "gather" keys and values, or "heads" for tokens. "auto": the
            form in which the busiest rank sends and receives fewer bytes.
    """

    exchange: str = "auto"

    trains = True
    packs = True
    computes_padding = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.exchange not in EXCHANGES:
            raise ValueError(f"exchange={self.exchange!r} is unknown: choose one of {', '.join(EXCHANGES)}.")

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

    def form(self, shape: CallShape, loads: list[int]) -> str:
        """ "gather" or "heads": `exchange`, or for "auto" the form that moves fewer bytes on the busiest rank."""
        if self.exchange != "auto":
            return self.exchange
        dealt = max(sum(heads.moved(shape, loads, rank)) for rank in range(len(loads)))
        return "heads" if dealt < 2 * _gathered(shape, loads) else "gather"

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, window: Window, step: Step, kernel: BoundAttend, group: Group
    ) -> Partial:
        """Exchange heads and attend once, or gather this layer's keys and values and attend run by run."""
        assert step.layout is not None
        dealt, real = step.layout.extra
        padding = None if bool(real.all()) else real.to(query.device)
        batch, num_heads, _, head_dim = query.shape
        drops = kernel.draw(query, real.shape[1])
        shape = CallShape(num_heads, key.shape[1], head_dim, value.shape[3], query.element_size(), batch)
        if group.size > 1 and self.form(shape, step.layout.loads) == "heads":
            own_heads = heads.deal_heads(num_heads, key.shape[1], group.size)[group.rank].query
            mask = Mask(
                causal=True, window=window, offset=0, key_padding=padding,
                query_segments=step.texts, key_segments=step.texts,
                drops=None if drops is None else drops.cut(heads=slice(own_heads.start, own_heads.stop)),
            )  # fmt: skip
            return heads.attention(query, key, value, dealt, group, lambda q, k, v: kernel(q, k, v, mask))
        loads = step.layout.loads
        # Two results per row would have to be kept for a backward pass, and far columns of a window need no exchange.
        if group.size > 1 and not torch.is_grad_enabled() and window == (None, None) and not kernel.dropout:
            return _meanwhile(query, key, value, step, padding, kernel, group)
        keys, values = (
            heads.in_order(group.all_gather(x, loads, 2, what="keys and values"), dealt) for x in (key, value)
        )
        parts, start = [], 0
        for run in dealt[group.rank]:
            rows = query[:, :, start : start + len(run)]
            own = None if step.texts is None else step.texts[:, run.start : run.stop]
            mask = Mask(
                causal=True, window=window, offset=run.start, key_padding=padding,
                query_segments=own, key_segments=step.texts,
                drops=None if drops is None else drops.cut(slice(run.start, run.stop)),
            )  # fmt: skip
            parts.append(kernel(rows, keys, values, mask))
            start += len(run)
        part = Partial.cat(parts)
        return Partial(tie(part.out, keys, values), part.lse)

    def settle(self, config: Mapping[str, Any], group: Group) -> Dense:
        """Return self: no field depends on the model."""
        return self

    def cost(self, layout: Layout, rank: int, shape: CallShape) -> Cost:
        """Gathered shards are sent padded to the length of the longest one; heads as `heads.moved` counts them."""
        runs, size, load = layout.extra[0][rank], len(layout.loads), layout.loads[rank]
        num_tokens, token_bytes = layout.extra[1].shape[1], shape.query_bytes + shape.result_bytes
        sent = received = _gathered(shape, layout.loads)
        pairs = sum(triangle(run.stop) - triangle(run.start) for run in runs)
        held = load * token_bytes + (load * (size > 1) + num_tokens) * shape.key_bytes
        if size > 1 and self.form(shape, layout.loads) == "heads":
            sent, received = heads.moved(shape, layout.loads, rank)
            share = heads.deal_heads(shape.heads, shape.kv_heads, size)[rank]
            pairs = triangle(num_tokens) * len(share.query) // shape.heads
            keys = len(share.key) if share.is_grouped else len(share.query)
            held = load * (token_bytes + shape.key_bytes) + num_tokens * (
                len(share.query) * token_bytes // shape.heads + keys * shape.key_bytes // shape.kv_heads
            )
        return Cost(
            sent=sent,
            received=received,
            held=held,
            pairs=pairs,
            rows=load,
            cache=load * shape.key_bytes,
            decode=(size - 1) * shape.result_bytes,
        )


def _meanwhile(
    query: Tensor, key: Tensor, value: Tensor, step: Step, padding: Tensor | None, kernel: BoundAttend, group: Group
) -> Partial:
    """Gather keys and values, attend to the own ones in the meantime, then to those of the others; both are merged.

    A rank's slots are in the order of the prompt, so causal attention over its own slots is right. Of the other ranks'
    keys, in the order of the prompt, each run of rows sees a prefix, and all of it.

    Args:
        query, key, value: as in `Dense.attention`, the slots of `step.layout`; no window hides a key.
        padding: (B, L) bool, False for padding, or None.
    """
    assert step.layout is not None
    dealt, rank, head_dim = step.layout.extra[0], group.rank, key.shape[3]
    both = group.start_all_gather(torch.cat([key, value], 3), step.layout.loads, 2, what="keys and values")

    def at(runs: list[range]) -> tuple[Tensor | None, Tensor | None]:
        """Which columns of these runs are real, and the texts that they belong to; None for all, and for one text."""
        return tuple(None if x is None else _columns(x, runs) for x in (padding, step.texts))  # type: ignore[return-value]

    real, texts = at(dealt[rank])
    mask = Mask(causal=True, offset=0, key_padding=real, query_segments=texts, key_segments=texts)
    kernel = kernel.with_kernel_for(query, key, value, mask)
    part = kernel(query, key, value, mask)
    others = [runs for other, runs in enumerate(dealt) if other != rank]
    gathered = heads.in_order([shard for other, shard in enumerate(both()) if other != rank], others)
    real, foreign = at(sorted((run for runs in others for run in runs), key=lambda run: run.start))
    parts, start = [], 0
    for run in dealt[rank]:
        rows, before = slice(start, start + len(run)), slice(run.start - start)
        mask = Mask(
            key_padding=None if real is None else real[:, before],
            query_segments=None if texts is None else texts[:, rows],
            key_segments=None if foreign is None else foreign[:, before],
        )
        keys, values = gathered[:, :, before, :head_dim], gathered[:, :, before, head_dim:]
        own = part.rows(rows.start, rows.stop)
        parts.append(merge([own, kernel(query[:, :, rows], keys, values, mask)]) if before.stop else own)
        start += len(run)
    return Partial.cat(parts)


def _columns(tensor: Tensor, runs: list[range]) -> Tensor:
    """The columns of some runs, run after run, from (B, L)."""
    return torch.cat([tensor[:, run.start : run.stop] for run in runs], 1)


def _gathered(shape: CallShape, loads: list[int]) -> int:
    """Bytes that a rank sends, and receives, when all ranks gather the keys and values of one layer."""
    return (len(loads) - 1) * max(loads) * shape.key_bytes
