"""What travels between ranks in CQS attention: which groups, of which shapes, packed into one message for each rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from hf_attn_plugins.core.tensor_bytes import from_bytes, num_bytes, to_bytes
from hf_attn_plugins.cqs.tokens import TOKENS
from hf_attn_plugins.cqs.worker_share import Range
from hf_attn_plugins.parallel.cqs_plan import RankPlan

if TYPE_CHECKING:
    from hf_attn_plugins.parallel.comm.group import Group


class Call(NamedTuple):
    """What both exchanges of a call share: the plan, and the sizes of what travels."""

    plan: RankPlan
    group: Group
    query: torch.Size
    key: torch.Size
    value: torch.Size
    dtype: torch.dtype

    @property
    def shard(self) -> Range:
        return self.plan.shards[self.group.rank]

    @property
    def wide(self) -> torch.dtype:
        """What is merged and summed in: float64 for float64, else float32."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def local(self, span: Range) -> slice:
        """Where a group of this rank's shard lies in its tensors."""
        return slice(span[0] - self.shard[0], span[1] - self.shard[0])

    def is_own(self, span: Range) -> bool:
        return self.plan.owner(span) == self.group.rank

    def foreign(self, spans: Sequence[Range]) -> list[Range]:
        """Those of other ranks, in the order of these: ranges ascend, and so do the ranks that own them."""
        return [span for span in spans if not self.is_own(span)]

    def shape(self, like: torch.Size, span: Range) -> tuple[int, ...]:
        return (*like[:TOKENS], span[1] - span[0], like[-1])

    def out_shape(self, span: Range) -> tuple[int, ...]:
        return (*self.query[:TOKENS], span[1] - span[0], self.value[-1])

    def given(self, index: int, other: int) -> list[tuple[int, Range]]:
        """What this rank gives another in a round: (0 query, 1 key, 2 value; group)."""
        return self._moved(index, self.group.rank, other)

    def taken(self, index: int, other: int) -> list[tuple[int, Range]]:
        """What this rank gets from another in a round."""
        return self._moved(index, other, self.group.rank)

    def _moved(self, index: int, owner: int, worker: int) -> list[tuple[int, Range]]:
        rows = self.plan.rows_moved(index, owner, worker)
        keys = self.plan.keys_moved(index, owner, worker)
        return [(0, span) for span in rows] + [(kind, span) for kind in (1, 2) for span in keys]

    def swap(
        self, what: str, given: list[list[Tensor]], taken: list[list[tuple[tuple[int, ...], torch.dtype]]]
    ) -> list[list[Tensor]]:
        """One exchange of lists of tensors, rank by rank; both sides know all shapes."""
        if self.group.size == 1:
            return [[]]
        messages = [packed(tensors, self.group.device) for tensors in given]
        sizes = [[sum(num_bytes(*each) for each in tensors)] for tensors in taken]
        arrived = self.group.all_to_all(messages, sizes, what=what)
        return [unpacked(message, tensors) for message, tensors in zip(arrived, taken, strict=True)]


def packed(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    if not tensors:
        return torch.empty(0, dtype=torch.uint8, device=device)
    return torch.cat([to_bytes(x) for x in tensors])


def unpacked(message: Tensor, expected: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
    parts = message.split([num_bytes(*each) for each in expected])
    return [from_bytes(part, dtype, shape) for part, (shape, dtype) in zip(parts, expected, strict=True)]
