"""A plan of attention as rectangles of the score matrix, and the tables that kernels loop over: integers only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Rectangle(NamedTuple):
    """Rows row_begin..row_end see keys key_begin..key_end.

    The rectangles of one row of the batch must not share a (row, key) pair: the pair would count twice.

    Attributes:
        position_masked: causal and window of the mask bind the rectangle; else every row sees every key of it.
        shift: added to the rows' positions on the key axis where position_masked. A packed sequence whose rows begin
            at 2 and whose keys begin at 4 has shift 2 if both have one length.
    """

    row_begin: int
    row_end: int
    key_begin: int
    key_end: int
    position_masked: bool = False
    shift: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether it holds no pair."""
        return self.row_begin >= self.row_end or self.key_begin >= self.key_end


Tables = list[list[list[tuple[int, ...]]]]
Rectangles = Sequence[Rectangle] | Sequence[Sequence[Rectangle]]


def per_batch(plan: Rectangles) -> list[list[Rectangle]]:
    """The plan as one list of rectangles per row of the batch, or a single list that all of them share."""
    if not len(plan) or isinstance(plan[0], Rectangle):
        return [list(plan)]  # type: ignore[arg-type]
    return [list(rectangles) for rectangles in plan]  # type: ignore[arg-type]


def table(plan: list[list[Rectangle]], length: int, tile: int, *, of_keys: bool = False) -> Tables:
    """The rectangles that touch each tile, per row of the batch: (begin, end, begin, end, position_masked, shift).

    The first begin and end are rows, the second keys; `of_keys` gives tiles of keys and swaps the two. Every list is
    padded with empty rectangles to the length of the longest.

    Example: `table([[Rectangle(0, 4, 0, 2), Rectangle(4, 8, 0, 8, True)]], 8, 4)` is
    [[[(0, 4, 0, 2, 0, 0)], [(4, 8, 0, 8, 1, 0)]]].
    """
    tables = []
    for rectangles in plan:
        tiles: list[list[tuple[int, ...]]] = [[] for _ in range(0, length, tile)]
        for rectangle in rectangles:
            if rectangle.is_empty:
                continue
            own, other = (rectangle[0:2], rectangle[2:4]) if not of_keys else (rectangle[2:4], rectangle[0:2])
            for index in range(own[0] // tile, (own[1] - 1) // tile + 1):
                tiles[index].append((*own, *other, int(rectangle.position_masked), rectangle.shift))
        tables.append(tiles)
    most = max((len(entries) for tiles in tables for entries in tiles), default=0)
    nothing = (0,) * len(Rectangle._fields)
    return [[entries + [nothing] * (max(most, 1) - len(entries)) for entries in tiles] for tiles in tables]


def check_rectangles(plan: list[list[Rectangle]], batch: int, num_rows: int, num_keys: int) -> None:
    """Raises ValueError for a plan of another batch size, or rectangles that leave the score matrix."""
    if len(plan) not in (1, batch):
        raise ValueError(f"a plan has one list of rectangles, or one per row of the batch ({batch}), got {len(plan)}.")
    for rectangle in (rectangle for rectangles in plan for rectangle in rectangles):
        rows_fit = rectangle.row_begin >= 0 and rectangle.row_end <= num_rows
        if not (rows_fit and rectangle.key_begin >= 0 and rectangle.key_end <= num_keys):
            raise ValueError(f"{rectangle} leaves the score matrix of {num_rows} rows and {num_keys} keys.")
