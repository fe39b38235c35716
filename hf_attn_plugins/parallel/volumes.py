"""What each method costs a rank, counted from the plan it follows: bytes on the wire, bytes held, pairs, cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_attn_plugins.cqs.cost import Shape
from hf_attn_plugins.parallel.cqs import CQS
from hf_attn_plugins.parallel.cqs_plan import RankPlan
from hf_attn_plugins.parallel.dealing import mirrored
from hf_attn_plugins.parallel.methods import method
from hf_attn_plugins.parallel.star import Parts, Star

# The exchanges of a sharded prompt's attention, by the names they are counted under.
EXCHANGES = ("cqs groups", "cqs results", "keys and values", "merge", "anchor")


@dataclass(frozen=True)
class Cost:
    """One rank's share of a prompt, in one layer.

    Attributes:
        sent, received: bytes to and from other ranks.
        held: bytes of queries, keys, values and results on the rank at once, its own and those that came in; what a
            backend or a kernel holds beside them is not in it.
        pairs: (query, key) pairs computed.
        rows: tokens that go through projections and MLP here.
        cache: bytes of keys and values that stay.
        decode: bytes received for each generated token.
    """

    sent: int
    received: int
    held: int
    pairs: int
    rows: int
    cache: int
    decode: int


def costs(name: str, num_tokens: int, num_ranks: int, shape: Shape, **options: Any) -> list[Cost]:
    """The cost of a prompt without padding on each rank.

    Args:
        name, options: as in `context_parallel`.

    Raises:
        ValueError: an unknown method or option, or a prompt that is too short to be cut for so many ranks.
    """
    chosen: Any = method(name, **options)
    real = torch.ones(shape.batch, num_tokens, dtype=torch.bool)
    layouts = [chosen.deal(real, rank, num_ranks) for rank in range(num_ranks)]
    if any(layout is None for layout in layouts):
        raise ValueError(f"{num_tokens} tokens are too few for {name} to be cut for {num_ranks} ranks.")
    if isinstance(chosen, CQS):
        return [_cqs(layout.extra[0], rank, shape) for rank, layout in enumerate(layouts)]
    if isinstance(chosen, Star):
        return [_star(layout.extra, layout.loads, rank, shape) for rank, layout in enumerate(layouts)]
    return _dense(num_tokens, num_ranks, shape)


def _cqs(plan: RankPlan, rank: int, shape: Shape) -> Cost:
    begin, end = plan.shards[rank]
    volumes = plan.inputs(rank, shape), plan.results(rank, shape)
    rows, keys = plan.tokens_held(rank)
    return Cost(
        sent=sum(volume.sent for volume in volumes),
        received=sum(volume.received for volume in volumes),
        held=rows * (shape.query_bytes + shape.result_bytes) + keys * shape.key_bytes,
        pairs=plan.pairs(rank),
        rows=end - begin,
        cache=(end - begin) * shape.key_bytes,
        decode=(plan.num_ranks - 1) * shape.result_bytes,
    )


def _star(parts: Parts, loads: Sequence[int], rank: int, shape: Shape) -> Cost:
    row, others = parts.rows[0], len(loads) - 1
    asked, own, anchor = len(row.query), row.own, len(row.plan.anchor)
    blocks = [
        range(at, min(at + row.plan.block_size, own.stop)) for at in range(own.start, own.stop, row.plan.block_size)
    ]
    pairs = sum(_triangle(len(block)) + (anchor * len(block) if block.start else 0) for block in blocks)
    pairs += _triangle(len(row.anchor))
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


def _dense(num_tokens: int, num_ranks: int, shape: Shape) -> list[Cost]:
    dealt = mirrored(num_tokens, num_ranks)
    loads = [sum(map(len, runs)) for runs in dealt]
    # Shards travel padded to the longest.
    moved = (num_ranks - 1) * max(loads) * shape.key_bytes
    return [
        Cost(
            sent=moved,
            received=moved,
            held=load * (shape.query_bytes + shape.result_bytes)
            + (load * (num_ranks > 1) + num_tokens) * shape.key_bytes,
            pairs=sum(_triangle(run.stop) - _triangle(run.start) for run in runs),
            rows=load,
            cache=load * shape.key_bytes,
            decode=(num_ranks - 1) * shape.result_bytes,
        )
        for load, runs in zip(loads, dealt, strict=True)
    ]


def _triangle(count: int) -> int:
    return count * (count + 1) // 2
