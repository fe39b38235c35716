"""What a rank computes of a star prompt: ranges of tokens of each row, and the slots that they lie in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn_plugins.star.plan import Plan


class Row(NamedTuple):
    """What a rank does of one row of the batch: ranges of tokens, counted from the row's first real one."""

    first: int
    plan: Plan
    own: range
    anchor: range  # recomputed here
    query: range


@dataclass(frozen=True, eq=False)
class Parts:
    """Where the three parts lie in a rank's slots: anchor | blocks | query, each as long as the longest row's.

    Attributes:
        rows: one for each row of the batch.
        anchor, own, query: slots of the parts.
        kept: places within the query's part whose keys stay on this rank.
        source: whose keys the anchor's are, if they are broadcast; None where they are recomputed.
        widest: tokens of the longest anchor in the batch.
    """

    rows: list[Row]
    anchor: range
    own: range
    query: range
    kept: range
    source: int | None
    widest: int


class Picker:
    """Queries of some slots, keys and values of others, of some rows of the batch."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, index: Tensor) -> None:
        whole = len(index) == len(query)
        self.tensors = [x if whole else x.index_select(0, index) for x in (query, key, value)]

    def __call__(self, rows: range, keys: range) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.tensors
        return (
            query[:, :, rows.start : rows.stop],
            key[:, :, keys.start : keys.stop],
            value[:, :, keys.start : keys.stop],
        )


def alike(rows: list[Row]) -> list[tuple[list[int], Row]]:
    """Rows of the batch that are dealt alike, wherever their padding ends."""
    found: dict[Row, list[int]] = {}
    for index, row in enumerate(rows):
        found.setdefault(row._replace(first=0), []).append(index)
    return [(members, row) for row, members in found.items()]


def span(row: Tensor) -> tuple[int, int]:
    """(first, end) of a row's real tokens.

    Raises:
        NotImplementedError: padding between them.
    """
    places = row.nonzero()[:, 0].tolist()
    if not places:
        return 0, 0
    if places[-1] - places[0] + 1 != len(places):
        raise NotImplementedError(
            "star_attention on several ranks takes prompts with padding on one side or both, not between tokens: "
            "leave it out, or use tiled_attention."
        )
    return places[0], places[-1] + 1


def token_range(tokens: range, first: int) -> Tensor:
    return torch.arange(first + tokens.start, first + tokens.stop)
