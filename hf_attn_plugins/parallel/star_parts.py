"""The part of a Star prompt that one rank computes: token ranges of each batch row, and the slots of these tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn_plugins.star.plan import Plan


class Row(NamedTuple):
    """The token ranges of one batch row that a rank computes, counted from the row's first real token.

    Attributes:
        first: column of the row's first real token.
        plan: blocks, anchor and query of the row.
        own: tokens of this rank's blocks; empty if the rank has no block of this row.
        anchor: anchor tokens that this rank recomputes; empty if it has them already or receives their keys.
        query: tokens of the query, the same on every rank.
    """

    first: int
    plan: Plan
    own: range
    anchor: range
    query: range


@dataclass(frozen=True, eq=False)
class StarParts:
    """The slots of the three parts of a rank's forward: anchor | blocks | query. Each part fits its longest batch row.

    Attributes:
        rows: one entry per batch row.
        anchor, own, query: slots of the three parts.
        kept: indices into the query's part whose keys this rank stores.
        source: the rank that broadcasts the anchor's keys; None if every rank recomputes them.
        longest_anchor: tokens of the longest anchor in the batch.
    """

    rows: list[Row]
    anchor: range
    own: range
    query: range
    kept: range
    source: int | None
    longest_anchor: int


class Picker:
    """Selects slots of some batch rows: `pick(rows, keys)` gives queries of slots `rows`, keys and values of `keys`.

    Args:
        query, key, value: (B, H, T, D).
        index: (b,) long, the batch rows.
    """

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, index: Tensor) -> None:
        whole = len(index) == len(query)
        self.tensors = [x if whole else x.index_select(0, index) for x in (query, key, value)]

    def __call__(self, rows: range, keys: range) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = self.tensors
        """Query (b, Hq, len(rows), D), key (b, Hkv, len(keys), D), value (b, Hkv, len(keys), Dv)."""
        return (
            query[:, :, rows.start : rows.stop],
            key[:, :, keys.start : keys.stop],
            value[:, :, keys.start : keys.stop],
        )


def alike(rows: list[Row]) -> list[tuple[list[int], Row]]:
    """Group the batch rows with equal ranges, wherever their padding ends: (indices of the rows, their ranges)."""
    groups: dict[Row, list[int]] = {}
    for index, row in enumerate(rows):
        groups.setdefault(row._replace(first=0), []).append(index)
    return [(members, row) for row, members in groups.items()]


def span(row: Tensor) -> tuple[int, int]:
    """(first, end) of the real tokens of a batch row; (0, 0) if it has none.

    Args:
        row: (L,) bool, False for padding.

    Raises:
        NotImplementedError: padding between real tokens.
    """
    columns = row.nonzero()[:, 0].tolist()
    if not columns:
        return 0, 0
    if columns[-1] - columns[0] + 1 != len(columns):
        raise NotImplementedError(
            "star_attention on several ranks takes prompts with padding on one side or both, not between tokens: "
            "leave it out, or use tiled_attention."
        )
    return columns[0], columns[-1] + 1


def token_range(tokens: range, first: int) -> Tensor:
    """The columns of `tokens` as a long tensor, for a row whose first real token is in column `first`."""
    return torch.arange(first + tokens.start, first + tokens.stop)
