"""Star Attention on several ranks: each encodes its own blocks, all of them answer the query together.

A rank's forward has three parts, all of them in one pass: the anchor again (where it is recomputed), the rank's own
blocks, and the query. Blocks attend to the anchor and themselves, without a word to other ranks, unless the anchor's
keys are broadcast layer by layer. The query's rows are merged over all ranks in every layer.
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
from hf_attn_plugins.kernels.bound_attend import Kernel
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.link import Wire, cheaper_anchor
from hf_attn_plugins.parallel.method import Cost, Layout, Step, triangle
from hf_attn_plugins.parallel.partition import blocks, level
from hf_attn_plugins.parallel.star_parts import Parts, Picker, Row, alike, span, token_range
from hf_attn_plugins.star.cost import ModelShape
from hf_attn_plugins.star.options import StarOptions
from hf_attn_plugins.star.plan import plan_for

ANCHORS = ("auto", "recompute", "broadcast")


@dataclass(frozen=True)
class Star(StarOptions):
    """`star_attention` on several ranks.

    Attributes:
        anchor: how a rank gets the anchor's keys: "recompute" (the anchor in front of its blocks, once for all of
            them), "broadcast" (from the first rank, in every layer), or "auto" by `cost.cheaper_anchor`.
        shape, wire: what "auto" goes by; `settle` fills them in.
    """

    anchor: str = "auto"
    shape: ModelShape | None = None
    wire: Wire | None = None

    trains = False

    @classmethod
    def names(cls) -> list[str]:
        return [name for name in super().names() if name not in ("shape", "wire")]

    def settle(self, config: Mapping[str, Any], group: Group) -> Star:
        """Itself with what the choice of the anchor depends on: the same on every rank."""
        nodes = group.objects(-(-group.size // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", group.size)))))
        return replace(self, shape=ModelShape.of(config), wire=Wire.of(group.device.type, max(nodes)))

    def cost(self, layout: Layout, rank: int, shape: CallShape) -> Cost:
        """Blocks, anchor and query of the first row; the query is merged over all ranks."""
        parts, loads = layout.extra, layout.loads
        row, others = parts.rows[0], len(loads) - 1
        asked, own, anchor = len(row.query), row.own, len(row.plan.anchor)
        blocks = [
            range(at, min(at + row.plan.block_size, own.stop)) for at in range(own.start, own.stop, row.plan.block_size)
        ]
        pairs = sum(triangle(len(block)) + (anchor * len(block) if block.start else 0) for block in blocks)
        pairs += triangle(len(row.anchor))
        pairs += asked * len(own) + sum(asked - place for place in parts.kept)
        merge = others * asked * shape.result_bytes
        sent = received = 0
        if parts.source is not None:
            sent = others * anchor * shape.key_bytes if rank == parts.source else 0
            received = 0 if rank == parts.source else anchor * shape.key_bytes
        slots = len(row.anchor) + len(own) + asked
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
        spans = [span(row) for row in real]
        plans = [plan_for(end - first, self.block_size, self.anchor_size, self.query_size) for first, end in spans]
        dealt = [blocks(plan.context, plan.block_size, size) for plan in plans]
        most = max(plan.num_blocks for plan in plans)
        if rank == 0 and most < size:
            longest = max(plan.context for plan in plans)
            warn_once(
                f"star_attention: a context of {longest} tokens makes {most} blocks of {self.block_size or 'default'} "
                f"tokens for {size} ranks, {size - most} of them have none: block_size={max(1, -(-longest // size))} "
                "or less gives work to all."
            )
        widest = max(len(plan.anchor) for plan in plans)
        recompute = self._choice(widest, size) == "recompute"

        def row_of(rank: int, row: int) -> Row:
            plan, mine = plans[row], dealt[row][rank]
            own = range(plan.block(mine[0]).start, plan.block(mine[-1]).stop) if mine else range(0)
            again = plan.anchor if recompute and own.start else range(0)
            return Row(spans[row][0], plan, own, again, plan.query)

        rows = [row_of(rank, row) for row in range(len(plans))]
        held = [max(len(row_of(other, row).own) for row in range(len(plans))) for other in range(size)]
        queries = max(len(row.query) for row in rows)
        shares = level(held, queries)
        anchors, owns = max(len(row.anchor) for row in rows), max(len(row.own) for row in rows)
        total = max(1, anchors + owns + queries)
        parts = Parts(
            rows,
            range(anchors),
            range(anchors, anchors + owns),
            range(anchors + owns, anchors + owns + queries),
            shares[rank],
            None if recompute else 0,
            widest,
        )
        columns = torch.full((len(rows), total), -1)
        for index, row in enumerate(rows):
            for slots, tokens in ((parts.anchor, row.anchor), (parts.own, row.own)):
                columns[index, slots.start : slots.start + len(tokens)] = token_range(tokens, row.first)
            # The query's part is filled from its end: its last slot is the last token of every row.
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
        self, query: Tensor, key: Tensor, value: Tensor, window: Window, step: Step, kernel: Kernel, group: Group
    ) -> Partial:
        assert step.layout is not None
        parts: Parts = step.layout.extra
        anchor = self._anchor(key, value, parts, group)
        out, lse = Partial.empty(query, value.shape[-1])
        asked = range(parts.query.start, parts.query.stop)
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
        if asked:
            part = Partial(out[:, :, asked.start : asked.stop], lse[:, :, asked.start : asked.stop])
            merged = merge(group.gather_partials(part))
            out[:, :, asked.start : asked.stop], lse[:, :, asked.start : asked.stop] = merged
        return Partial(out, lse)

    @staticmethod
    def _anchor(key: Tensor, value: Tensor, parts: Parts, group: Group) -> tuple[Tensor, Tensor]:
        """The anchor's keys and values on this rank, (B, Hkv, a, D and Dv)."""
        begin = parts.anchor.start if parts.anchor else parts.own.start
        here = key[:, :, begin : begin + parts.widest], value[:, :, begin : begin + parts.widest]
        if parts.source is None or not parts.widest:
            return here
        if group.rank != parts.source:
            here = tuple(x.new_empty(*x.shape[:2], parts.widest, x.shape[3]) for x in (key, value))  # type: ignore[assignment]
        sent = torch.cat([here[0].flatten(2), here[1].flatten(2)], 2)
        found = group.broadcast(sent, parts.source, what="anchor")
        split = parts.widest * key.shape[3]
        return found[:, :, :split].unflatten(2, (parts.widest, -1)), found[:, :, split:].unflatten(
            2, (parts.widest, -1)
        )

    @staticmethod
    def _blocks(
        pick: Picker, slots: range, anchor: tuple[Tensor, ...], row: Row, window: Window, kernel: Kernel
    ) -> Partial:
        """This rank's blocks, one after another: each over the anchor (but for the first block) and itself."""
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
            else:  # the anchor stays at its true distance
                far = kernel(query, anchor[0], anchor[1], Mask(window=window, offset=position))
                done.append(merge([kernel(query, key, value, causal), far]))
        return Partial.cat(done)

    @staticmethod
    def _question(pick: Picker, slots: range, row: Row, parts: Parts, window: Window, kernel: Kernel) -> Partial:
        """The query's rows over the keys of this rank: all of its blocks, and what it keeps of the query itself."""
        context = row.plan.context
        own = range(parts.own.start, parts.own.start + len(row.own))
        far = kernel(*pick(slots, own), Mask(window=window, offset=context - row.own.start))
        padding = parts.query.stop - parts.query.start - len(row.query)
        kept = range(max(parts.kept.start, padding), max(parts.kept.stop, padding))
        keys = range(parts.query.start + kept.start, parts.query.start + kept.stop)
        near = kernel(*pick(slots, keys), Mask(causal=True, window=window, offset=padding - kept.start))
        return merge([far, near])
