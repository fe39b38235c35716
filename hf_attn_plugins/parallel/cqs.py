"""`cqs_attention` on several ranks: a rank stores its own tokens and computes the group pairs of its own workers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask, Window
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.cqs.options import CQSOptions
from hf_attn_plugins.cqs.planning.cost import CallShape
from hf_attn_plugins.kernels.bound_attend import BoundAttend
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.cqs_exchange import attention
from hf_attn_plugins.parallel.cqs_plan import choose_workers, rank_plan
from hf_attn_plugins.parallel.method import Cost, Layout, Step


@dataclass(frozen=True)
class CQS(CQSOptions):
    """`cqs_attention` on several ranks: exact, forward and backward.

    Hidden states, projections and MLPs are sharded like the tokens.

    Attributes:
        workers: W, at least the number of ranks; None lets `cqs_plan.choose_workers` choose.
        min_length: every rank computes the whole prompt if it has fewer tokens than this, or fewer than workers.
        rounds: exchanges per layer. 1 sends the fewest bytes; more rounds keep fewer tokens of other ranks in memory.
    """

    min_length: int = 1
    rounds: int = 1

    trains = True
    packs = True
    computes_padding = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("rounds")

    def deal(self, real: Tensor, rank: int, size: int) -> Layout | None:
        """See `Method.deal`: one run of tokens per rank (`cqs_plan.RankPlan.shards`)."""
        tokens = real.shape[1]
        workers = self.workers or choose_workers(tokens, size)
        plan = rank_plan(tokens, size, workers, self.interest_set, True, self.rounds)
        if tokens < max(workers, self.min_length):
            return None
        shard = range(*plan.shards[rank])
        columns = torch.arange(shard.start, shard.stop).expand(len(real), -1)
        slots = torch.arange(len(shard))
        padding = None if bool(real.all()) else real
        return Layout(columns, slots, slots, [end - begin for begin, end in plan.shards], extra=(plan, padding))

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, window: Window, step: Step, kernel: BoundAttend, group: Group
    ) -> Partial:
        """One `cqs_exchange.attention`; a window leaves out the groups that are out of reach of each other."""
        assert step.layout is not None
        plan, padding = step.layout.extra
        if window[0] is not None and window[0] < plan.num_tokens:
            plan = rank_plan(
                plan.num_tokens, plan.num_ranks, plan.num_workers, plan.division.interest_set, True, plan.num_rounds,
                window[0],
            )  # fmt: skip
        real = None if padding is None else padding.to(query.device)
        mask = Mask(
            causal=True, window=window, key_padding=real, query_segments=step.texts, key_segments=step.texts,
            drops=kernel.draw(query, plan.num_tokens),
        )  # fmt: skip
        return attention(
            query, key, value, plan, group, mask=mask,
            scale=kernel.scale, softcap=kernel.softcap, dropout=kernel.dropout, kernel=kernel.name,
        )  # fmt: skip

    def settle(self, config: Mapping[str, Any], group: Group) -> CQS:
        """Return self: no field depends on the model."""
        return self

    def cost(self, layout: Layout, rank: int, shape: CallShape) -> Cost:
        """Counted from the rank plan: groups received, results sent."""
        plan = layout.extra[0]
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
