"""Star Attention on several ranks: every rank encodes its own blocks, and all ranks together answer the query.

One forward of a rank computes three parts: the anchor (if the rank recomputes it), the rank's own blocks, the query.
A block attends to the anchor, to its halo and to itself. Rank 0 may broadcast the anchor's keys in every layer. The
keys of a halo that lies on other ranks are sent in every layer, in one message from each of these ranks. The query's
results are merged over all ranks in every layer.

A dense head is computed like a head whose halo is everything before the rank's blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask, Window
from hf_attn_plugins.core.partial import Partial, merge
from hf_attn_plugins.core.warn import warn_once
from hf_attn_plugins.cqs.planning.cost import CallShape
from hf_attn_plugins.kernels.attend_rectangles import attend_rectangles
from hf_attn_plugins.kernels.bound_attend import BoundAttend
from hf_attn_plugins.parallel.comm.collectives import tie
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.link import Wire, cheaper_anchor
from hf_attn_plugins.parallel.method import Cost, Layout, Step
from hf_attn_plugins.parallel.partition import blocks, level
from hf_attn_plugins.parallel.star_keys import keys_of
from hf_attn_plugins.parallel.star_parts import Reach, Row, StarParts, overlap, row_of, span, tokens_of
from hf_attn_plugins.star.cost import ModelShape
from hf_attn_plugins.star.dense_heads import Attention, by_heads
from hf_attn_plugins.star.options import StarOptions

ANCHORS = ("auto", "recompute", "broadcast")


@dataclass(frozen=True)
class Star(StarOptions):
    """`star_attention` on several ranks.

    Attributes:
        anchor: how a rank gets the anchor's keys and values. "recompute": it computes the anchor in front of its
            blocks, once for all of them. "broadcast": rank 0 sends them in every layer. "auto": the faster of the two
            by `link.cheaper_anchor`.
        shape, wire: the model's sizes and the ranks' speeds, which "auto" compares; `settle` fills them in.
    """

    anchor: str = "auto"
    shape: ModelShape | None = None
    wire: Wire | None = None

    trains = True
    packs = False
    computes_padding = False

    @classmethod
    def names(cls) -> list[str]:
        """The options that a user may give: all fields but `shape` and `wire`."""
        return [name for name in super().names() if name not in ("shape", "wire")]

    def settle(self, config: Mapping[str, Any], group: Group) -> Star:
        """A copy with `shape` and `wire` filled in; the same on every rank."""
        return replace(self, shape=ModelShape.of(config), wire=Wire.between(group))

    def cost(self, layout: Layout, rank: int, shape: CallShape) -> Cost:
        """Counted from the first batch row: the keys it sends and receives, its rectangles, and the query's merge."""
        parts: StarParts = layout.extra
        row, others = parts.rows[0], len(layout.loads) - 1
        merge = others * len(row.query) * shape.result_bytes
        sent = received = 0
        if parts.source is not None:
            anchor = parts.longest_anchor * shape.key_bytes
            sent, received = (others * anchor, 0) if rank == parts.source else (0, anchor)
        pairs, heads = 0, len(self.layer_heads)
        for reach, share in ((parts.sparse, shape.kv_heads - heads), (parts.dense, heads)):
            key_bytes = shape.key_bytes * share // shape.kv_heads
            sent += sum(len(overlap(row.own, halos[0])) for halos in reach.halos) * key_bytes
            received += len(reach.halos[rank][0]) * key_bytes
            pairs += reach.pairs() * share
        slots = len(parts.anchor) + len(row.own) + len(row.query)
        copied = slots * shape.key_bytes if received else 0  # received keys and the rank's own become one tensor
        return Cost(
            sent=merge + sent,
            received=merge + received,
            held=slots * (shape.query_bytes + shape.key_bytes + shape.result_bytes) + merge + received + copied,
            pairs=pairs // shape.kv_heads,
            rows=slots,
            cache=layout.loads[rank] * shape.key_bytes,
            decode=others * shape.result_bytes,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchor not in ANCHORS:
            raise ValueError(f"anchor={self.anchor!r} is unknown: choose one of {', '.join(ANCHORS)}.")

    def deal(self, real: Tensor, rank: int, size: int) -> Layout | None:
        """See `Method.deal`: whole blocks per rank, and the query on every rank; never None."""
        spans = [span(row) for row in real]
        plans = [self.plan_of(end - first) for first, end in spans]
        dealt = [blocks(plan.context, plan.block_size, size) for plan in plans]
        most = max(plan.num_blocks for plan in plans)
        if rank == 0 and most < size:
            longest = max(plan.context for plan in plans)
            warn_once(
                f"star_attention: a context of {longest} tokens makes {most} blocks of {self.block_size or 'default'} "
                f"tokens for {size} ranks, {size - most} of them have none: block_size={max(1, -(-longest // size))} "
                "or less gives every rank a block."
            )
        recompute = self._choice(max(len(plan.anchor) for plan in plans), size) == "recompute"

        def needed(rank: int, index: int) -> Row:
            plan, (sender, *_) = plans[index], dealt[index]
            sent = None if recompute else tokens_of(plan, sender).stop
            return row_of(spans[index][0], plan, tokens_of(plan, dealt[index][rank]), sent)

        ranks = [[needed(other, index) for index in range(len(plans))] for other in range(size)]
        rows, held = ranks[rank], [max(len(row.own) for row in rows) for rows in ranks]
        queries = max(len(row.query) for row in rows)
        shares = level(held, queries)
        anchors = max(len(row.anchor) for row in rows) if recompute else 0
        total = max(1, anchors + held[rank] + queries)
        parts = StarParts(
            ranks,
            rank,
            anchor=range(anchors),
            own=range(anchors, anchors + held[rank]),
            query=range(anchors + held[rank], anchors + held[rank] + queries),
            kept=shares[rank],
            source=None if recompute else 0,
            longest_anchor=max(len(row.anchor) for rows in ranks for row in rows),
        )
        columns = torch.full((len(rows), total), -1)
        for index, (first, *_) in enumerate(rows):
            for tokens, begin in parts.slots(index):
                columns[index, begin : begin + len(tokens)] = torch.arange(first + tokens.start, first + tokens.stop)
        own = torch.arange(parts.own.start, parts.own.stop)
        query = torch.arange(parts.query.start, parts.query.stop)
        return Layout(
            columns,
            stored=torch.cat([own, query[shares[rank].start : shares[rank].stop]]),
            reported=torch.cat([own, query]) if rank == 0 else own,
            loads=[mine + len(share) for mine, share in zip(held, shares, strict=True)],
            merged=queries,
            extra=parts,
        )

    def _choice(self, anchor: int, size: int) -> str:
        if self.anchor != "auto":
            return self.anchor
        if self.shape is None or self.wire is None:
            return "recompute"
        return cheaper_anchor(self.shape, anchor, size, self.wire)

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, window: Window, step: Step, kernel: BoundAttend, group: Group
    ) -> Partial:
        """The rectangles of all three parts over the keys that `keys_of` gives; then the query's merge over all ranks.

        Dense heads have rectangles and keys of their own.

        Raises:
            ValueError: a dense head that this layer does not have.
        """
        assert step.layout is not None
        parts: StarParts = step.layout.extra
        drops = kernel.draw(query, 0)
        if drops is not None:
            drops = drops._replace(rows=step.layout.columns.clamp_min(0).to(query.device))
            if step.packed_in is not None:  # weights of a text are dropped as in its packed row
                drops = drops._replace(lanes=drops.lanes[step.packed_in.to(query.device)])

        def over(reach: Reach) -> Attention:
            def attend(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Partial:
                keys, values, tokens = keys_of(key, value, parts, reach, group)
                if mask.drops is not None:
                    mask = mask.replace(drops=mask.drops._replace(keys=parts.key_columns(reach).to(query.device)))
                part = attend_rectangles(query, keys, values, reach.rectangles, mask=mask, **kernel.options)
                return Partial(tie(part.out, query, key, value, *tokens), part.lse)

            return attend

        mask = Mask(causal=True, window=window, offset=0, drops=drops)  # rectangles shift slots to their keys
        part = by_heads(query, key, value, mask, self.layer_heads, full=over(parts.dense), rest=over(parts.sparse))
        if not parts.query:
            return part
        asked = part.rows(parts.query.start, parts.query.stop)
        return Partial.cat([part.rows(0, parts.query.start), merge(group.gather_partials(asked))])
