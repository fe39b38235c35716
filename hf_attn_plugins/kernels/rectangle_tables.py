"""A plan of rectangles on its way to a kernel: plain integers in an operator's arguments, tables on the device."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_attn_plugins.core.rectangle import Rectangle, table

WIDTH = 1 + len(Rectangle._fields)


def flat(plan: Sequence[Sequence[Rectangle]]) -> list[int]:
    """WIDTH integers a piece: which list it is in, then the piece. A list without any leaves an empty one behind."""
    nothing = (Rectangle(0, 0, 0, 0),)
    return [
        int(number) for index, pieces in enumerate(plan) for piece in pieces or nothing for number in (index, *piece)
    ]


MOST_TABLES = 32  # tables kept on their devices: every layer of a model asks for the same plan


@functools.lru_cache(maxsize=MOST_TABLES)
def tables(
    pieces: tuple[int, ...], length: int, tile: int, of_keys: bool, device: torch.device
) -> tuple[Tensor | None, int]:
    """`core.rectangle.table` of a flat plan, (lists, tiles, most pieces, 6) int32, and the most pieces a tile has."""
    if not pieces:
        return None, 1
    lists: list[list[Rectangle]] = [[] for _ in range(max(pieces[::WIDTH]) + 1)]
    for i in range(0, len(pieces), WIDTH):
        row_begin, row_end, key_begin, key_end, position_masked, shift = pieces[i + 1 : i + WIDTH]
        lists[pieces[i]].append(Rectangle(row_begin, row_end, key_begin, key_end, bool(position_masked), shift))
    entries = torch.tensor(table(lists, length, tile, of_keys=of_keys), dtype=torch.int32)
    return entries.to(device), entries.shape[2]
