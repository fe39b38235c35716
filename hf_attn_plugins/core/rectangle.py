"""A plan of attention as rectangles of the score matrix, and the tables that kernels walk: integers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Piece(NamedTuple):
    """Rows row_begin..row_end see keys key_begin..key_end; if `banded`, only those that causal and window allow.

    The pieces of one row of the batch must not share a (row, key) pair, or that pair counts twice. `shift` is added to
    the position that a banded piece's rows have on the key axis: packed sequences lie at their own places on each side.
    """

    row_begin: int
    row_end: int
    key_begin: int
    key_end: int
    banded: bool = False
    shift: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether it holds no pair."""
        return self.row_begin >= self.row_end or self.key_begin >= self.key_end


Tables = list[list[list[tuple[int, ...]]]]
Plan = Sequence[Piece] | Sequence[Sequence[Piece]]


def per_batch(plan: Plan) -> list[list[Piece]]:
    """The plan as one list of pieces per row of the batch, or a single list that all of them share."""
    if not len(plan) or isinstance(plan[0], Piece):
        return [list(plan)]  # type: ignore[arg-type]
    return [list(pieces) for pieces in plan]  # type: ignore[arg-type]


def table(plan: list[list[Piece]], length: int, tile: int, *, of_keys: bool = False) -> Tables:
    """For every row of the batch and every tile, the pieces that touch it as (begin, end, begin, end, banded, shift).

    The held side comes first: rows, or keys when `of_keys`. All lists are padded with empty pieces to one length.

    Example: `table([[Piece(0, 4, 0, 2), Piece(4, 8, 0, 8, True)]], 8, 4)` is
    [[[(0, 4, 0, 2, 0, 0)], [(4, 8, 0, 8, 1, 0)]]].
    """
    tables = []
    for pieces in plan:
        tiles: list[list[tuple[int, ...]]] = [[] for _ in range(0, length, tile)]
        for piece in pieces:
            if piece.is_empty:
                continue
            held, walked = (piece[0:2], piece[2:4]) if not of_keys else (piece[2:4], piece[0:2])
            for index in range(held[0] // tile, (held[1] - 1) // tile + 1):
                tiles[index].append((*held, *walked, int(piece.banded), piece.shift))
        tables.append(tiles)
    most = max((len(entries) for tiles in tables for entries in tiles), default=0)
    nothing = (0,) * len(Piece._fields)
    return [[entries + [nothing] * (max(most, 1) - len(entries)) for entries in tiles] for tiles in tables]


def check_plan(plan: list[list[Piece]], batch: int, num_rows: int, num_keys: int) -> None:
    """Raises ValueError for a plan of another batch size, or pieces that leave the score matrix."""
    if len(plan) not in (1, batch):
        raise ValueError(f"a plan has one list of pieces, or one per row of the batch ({batch}), got {len(plan)}.")
    for piece in (piece for pieces in plan for piece in pieces):
        rows_fit = piece.row_begin >= 0 and piece.row_end <= num_rows
        if not (rows_fit and piece.key_begin >= 0 and piece.key_end <= num_keys):
            raise ValueError(f"{piece} leaves the score matrix of {num_rows} rows and {num_keys} keys.")
