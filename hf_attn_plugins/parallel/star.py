"""Star Attention on several ranks: every rank encodes its own blocks, and all ranks together answer the query.

One forward of a rank computes three parts: the anchor (if the rank recomputes it), the rank's own blocks, the query.
A block attends to the anchor and to itself. That needs no exchange, unless the anchor's keys are broadcast: then there
is one broadcast per layer. The query's results are merged over all ranks in every layer.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask, Window
from hf_attn_plugins.core.partial import Partial, merge
from hf_attn_plugins.core.warn import warn_once
from hf_attn_plugins.cqs.cost import CallShape
from hf_attn_plugins.kernels.bound_attend import BoundAttend
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.link import Wire, cheaper_anchor
from hf_attn_plugins.parallel.method import Cost, Layout, Step, triangle
from hf_attn_plugins.parallel.partition import blocks, level
from hf_attn_plugins.parallel.star_parts import Picker, Row, StarParts, alike, span, token_range
from hf_attn_plugins.star.cost import ModelShape
from hf_attn_plugins.star.options import StarOptions
from hf_attn_plugins.star.plan import plan_for

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

    trains = False

    @classmethod
    def names(cls) -> list[str]:
        """The options that a user may give: all fields but `shape` and `wire`."""
        return [name for name in super().names() if name not in ("shape", "wire")]

    def settle(self, config: Mapping[str, Any], group: Group) -> Star:
        """A copy with `shape` and `wire` filled in; the same on every rank."""
        nodes = group.objects(-(-group.size // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", group.size)))))
        return replace(self, shape=ModelShape.of(config), wire=Wire.of(group.device.type, max(nodes)))

    def cost(self, layout: Layout, rank: int, shape: CallShape) -> Cost:
        """Counted from the first batch row: its blocks, its anchor, and its query, which is merged over all ranks."""
        parts, loads = layout.extra, layout.loads
        row, others = parts.rows[0], len(loads) - 1
        num_queries, own, anchor = len(row.query), row.own, len(row.plan.anchor)
        blocks = [
            range(at, min(at + row.plan.block_size, own.stop)) for at in range(own.start, own.stop, row.plan.block_size)
        ]
        pairs = sum(triangle(len(block)) + (anchor * len(block) if block.start else 0) for block in blocks)
        pairs += triangle(len(row.anchor))
        pairs += num_queries * len(own) + sum(num_queries - slot for slot in parts.kept)
        merge = others * num_queries * shape.result_bytes
        sent = received = 0
        if parts.source is not None:
            sent = others * anchor * shape.key_bytes if rank == parts.source else 0
            received = 0 if rank == parts.source else anchor * shape.key_bytes
        slots = len(row.anchor) + len(own) + num_queries
        return Cost(
            sent=merge + sent,
            received=merge + received,
            held=slots * (shape.query_bytes + shape.key_bytes + shape.result_bytes) + merge + received,
            pairs=pairs,
            rows=slots,
            cache=loads[rank] * shape.key_bytes,
            decode=others * shape.result_bytes,
        )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.anchor not in ANCHORS:
            raise ValueError(f"anchor={self.anchor!r} is unknown: choose one of {', '.join(ANCHORS)}.")

    def deal(self, real: Tensor, rank: int, size: int) -> Layout | None:
        """See `Method.deal`: whole blocks per rank, and the query on every rank; never None."""
        spans = [span(row) for row in real]
        plans = [plan_for(end - first, self.block_size, self.anchor_size, self.query_size) for first, end in spans]
        dealt = [blocks(plan.context, plan.block_size, size) for plan in plans]
        most = max(plan.num_blocks for plan in plans)
        if rank == 0 and most < size:
            longest = max(plan.context for plan in plans)
            warn_once(
                f"star_attention: a context of {longest} tokens makes {most} blocks of {self.block_size or 'default'} "
                f"tokens for {size} ranks, {size - most} of them have none: block_size={max(1, -(-longest // size))} "
                "or less gives every rank a block."
            )
        longest_anchor = max(len(plan.anchor) for plan in plans)
        recompute = self._choice(longest_anchor, size) == "recompute"

        def row_of(rank: int, row: int) -> Row:
            plan, mine = plans[row], dealt[row][rank]
            own = range(plan.block(mine[0]).start, plan.block(mine[-1]).stop) if mine else range(0)
            recomputed = plan.anchor if recompute and own.start else range(0)
            return Row(spans[row][0], plan, own, recomputed, plan.query)

        rows = [row_of(rank, row) for row in range(len(plans))]
        held = [max(len(row_of(other, row).own) for row in range(len(plans))) for other in range(size)]
        queries = max(len(row.query) for row in rows)
        shares = level(held, queries)
        anchors, owns = max(len(row.anchor) for row in rows), max(len(row.own) for row in rows)
        total = max(1, anchors + owns + queries)
        parts = StarParts(
            rows,
            range(anchors),
            range(anchors, anchors + owns),
            range(anchors + owns, anchors + owns + queries),
            shares[rank],
            None if recompute else 0,
            longest_anchor,
        )
        columns = torch.full((len(rows), total), -1)
        for index, row in enumerate(rows):
            for slots, tokens in ((parts.anchor, row.anchor), (parts.own, row.own)):
                columns[index, slots.start : slots.start + len(tokens)] = token_range(tokens, row.first)
            # The query's part is filled from its end, so that its last slot is the last token of every batch row.
            columns[index, parts.query.stop - len(row.query) : parts.query.stop] = token_range(row.query, row.first)
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
        """The three parts one after another; then the query's results are merged over all ranks."""
        assert step.layout is not None
        parts: StarParts = step.layout.extra
        anchor = self._anchor(key, value, parts, group)
        out, lse = Partial.empty(query, value.shape[-1])
        for members, row in alike(parts.rows):
            index = torch.tensor(members, device=query.device)
            pick = Picker(query, key, value, index)
            pieces: list[tuple[range, Partial]] = []
            if row.anchor:
                slots = range(len(row.anchor))
                pieces.append((slots, kernel(*pick(slots, slots), Mask(causal=True, window=window))))
            if row.own:
                slots = range(parts.own.start, parts.own.start + len(row.own))
                keys = tuple(x.index_select(0, index)[:, :, : len(row.plan.anchor)] for x in anchor)
                pieces.append((slots, self._blocks(pick, slots, keys, row, window, kernel)))
            if row.query:
                slots = range(parts.query.stop - len(row.query), parts.query.stop)
                pieces.append((slots, self._question(pick, slots, row, parts, window, kernel)))
            for slots, part in pieces:
                out[index, :, slots.start : slots.stop], lse[index, :, slots.start : slots.stop] = part
        if parts.query:
            asked = slice(parts.query.start, parts.query.stop)
            merged = merge(group.gather_partials(Partial(out[:, :, asked], lse[:, :, asked])))
            out[:, :, asked], lse[:, :, asked] = merged
        return Partial(out, lse)

    @staticmethod
    def _anchor(key: Tensor, value: Tensor, parts: StarParts, group: Group) -> tuple[Tensor, Tensor]:
        """The anchor's keys (B, Hkv, a, D) and values (B, Hkv, a, Dv), on every rank; a is `parts.longest_anchor`."""
        begin = parts.anchor.start if parts.anchor else parts.own.start
        here = key[:, :, begin : begin + parts.longest_anchor], value[:, :, begin : begin + parts.longest_anchor]
        if parts.source is None or not parts.longest_anchor:
            return here
        if group.rank != parts.source:
            here = tuple(x.new_empty(*x.shape[:2], parts.longest_anchor, x.shape[3]) for x in (key, value))  # type: ignore[assignment]
        sent = torch.cat([here[0].flatten(2), here[1].flatten(2)], 2)
        anchor = group.broadcast(sent, parts.source, what="anchor")
        split = parts.longest_anchor * key.shape[3]
        keys, values = anchor[:, :, :split], anchor[:, :, split:]
        return keys.unflatten(2, (parts.longest_anchor, -1)), values.unflatten(2, (parts.longest_anchor, -1))

    @staticmethod
    def _blocks(
        pick: Picker, slots: range, anchor: tuple[Tensor, ...], row: Row, window: Window, kernel: BoundAttend
    ) -> Partial:
        """Attention of this rank's blocks, one by one, over the anchor and the block; block 0 over itself only."""
        size, done = row.plan.block_size, []
        causal = Mask(causal=True, window=window)
        for start in range(0, len(slots), size):
            block = slots[start : start + size]
            position = row.own.start + start
            query, key, value = pick(block, block)
            if not position or not row.plan.anchor:
                done.append(kernel(query, key, value, causal))
            elif window[0] is None or window[0] >= position + len(block) - 1:
                keys, values = (torch.cat([far, near], 2) for far, near in zip(anchor, (key, value), strict=True))
                done.append(kernel(query, keys, values, causal.replace(window=(None, None))))
            else:  # the window hides some anchor keys: they are counted at their true distance
                far = kernel(query, anchor[0], anchor[1], Mask(window=window, offset=position))
                done.append(merge([kernel(query, key, value, causal), far]))
        return Partial.cat(done)

    @staticmethod
    def _question(
        pick: Picker, slots: range, row: Row, parts: StarParts, window: Window, kernel: BoundAttend
    ) -> Partial:
        """Attention of the query's rows over this rank's keys: its blocks, and the query's keys that it stores."""
        context = row.plan.context
        own = range(parts.own.start, parts.own.start + len(row.own))
        far = kernel(*pick(slots, own), Mask(window=window, offset=context - row.own.start))
        padding = parts.query.stop - parts.query.start - len(row.query)
        kept = range(max(parts.kept.start, padding), max(parts.kept.stop, padding))
        keys = range(parts.query.start + kept.start, parts.query.start + kept.stop)
        near = kernel(*pick(slots, keys), Mask(causal=True, window=window, offset=padding - kept.start))
        return merge([far, near])
