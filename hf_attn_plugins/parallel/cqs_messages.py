"""The messages between ranks in CQS attention: which groups, with which shapes, packed into one message per rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_attn_plugins.cqs.planning.worker_share import Range
from hf_attn_plugins.cqs.tokens import TOKENS
from hf_attn_plugins.parallel.comm.collectives import Spec, exchange, start_exchange
from hf_attn_plugins.parallel.cqs_plan import RankPlan

if TYPE_CHECKING:
    from hf_attn_plugins.parallel.comm.group import Group


class CallPlan(NamedTuple):
    """The plan and the tensor sizes of one attention call, shared by its two exchanges.

    Attributes:
        plan: which rank owns and which rank computes what.
        group: the ranks.
        query, key, value: shapes (B, H, n, D) of this rank's shard; all but n are the same on every rank.
        dtype: of query, key, value and the result.
    """

    plan: RankPlan
    group: Group
    query: torch.Size
    key: torch.Size
    value: torch.Size
    dtype: torch.dtype

    @property
    def shard(self) -> Range:
        """(first, end) of the positions that this rank owns."""
        return self.plan.shards[self.group.rank]

    @property
    def wide(self) -> torch.dtype:
        """The dtype of merges and sums: float64 if `dtype` is float64, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def local(self, span: Range) -> slice:
        """The slice of this rank's tensors that holds a group of its shard."""
        return slice(span[0] - self.shard[0], span[1] - self.shard[0])

    def is_own(self, span: Range) -> bool:
        """Whether this rank owns the group."""
        return self.plan.owner(span) == self.group.rank

    def foreign(self, spans: Sequence[Range]) -> list[Range]:
        """The groups that other ranks own, in the order of `spans`. Ascending groups have ascending owners."""
        return [span for span in spans if not self.is_own(span)]

    def shape(self, like: torch.Size, span: Range) -> tuple[int, ...]:
        """`like` (B, H, n, D) with the tokens of one group: (B, H, end - first, D)."""
        return (*like[:TOKENS], span[1] - span[0], like[-1])

    def out_shape(self, span: Range) -> tuple[int, ...]:
        """The shape (B, Hq, end - first, Dv) of the output of one group."""
        return (*self.query[:TOKENS], span[1] - span[0], self.value[-1])

    def given(self, index: int, other: int) -> list[tuple[int, Range]]:
        """What this rank sends to rank `other` in round `index`: (kind, group), kind 0 query, 1 key, 2 value."""
        return self._moved(index, self.group.rank, other)

    def taken(self, index: int, other: int) -> list[tuple[int, Range]]:
        """What this rank receives from rank `other` in round `index`, as in `given`."""
        return self._moved(index, other, self.group.rank)

    def _moved(self, index: int, owner: int, worker: int) -> list[tuple[int, Range]]:
        rows = self.plan.rows_moved(index, owner, worker)
        keys = self.plan.keys_moved(index, owner, worker)
        return [(0, span) for span in rows] + [(kind, span) for kind in (1, 2) for span in keys]

    def swap(self, what: str, given: list[list[Tensor]], taken: list[list[Spec]]) -> list[list[Tensor]]:
        """One all-to-all of lists of tensors.

        Args:
            what: name of the exchange in `Traffic`.
            given: for each rank, the tensors to send to it.
            taken: for each rank, the (shape, dtype) of every tensor that it sends here. The plan gives them, so that no
                sizes are sent.

        Returns:
            for each rank, the tensors that it sent; [[]] in a group of one.
        """
        return [[]] if self.group.size == 1 else exchange(self.group, given, taken, what)

    def start_groups(self, index: int, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], list[list[Tensor]]]:
        """Begin to send the groups of this rank that others need in round `index`; the result waits for theirs."""
        if self.group.size == 1:
            return lambda: [[]]
        tensors, shapes, ranks = (query, key, value), (self.query, self.key, self.value), range(self.group.size)
        given = [[tensors[k][:, :, self.local(span)] for k, span in self.given(index, other)] for other in ranks]
        taken = [[(self.shape(shapes[k], span), self.dtype) for k, span in self.taken(index, other)] for other in ranks]
        return start_exchange(self.group, given, taken, "cqs groups")
