"""A plan of rectangles for FlexAttention: the table that its mask function reads, and the tiles that it visits.

Every layer of a model asks for the same plan, so what depends on integers alone is kept on its device.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.kernels.flex.bands import HIDDEN, WHOLE, Bands, bands_of

TILE = 128  # rows and keys of a tile; FlexAttention's own size
MOST_KEPT = 8  # plans kept on their devices

Lists = tuple[tuple[Rectangle, ...], ...]


class Places(NamedTuple):
    """What of the plan and its mask decides which tiles are visited; all of them integers.

    Attributes:
        lists: the lists of rectangles that differ.
        rows, keys: the sizes of the score matrix.
        left, right: a row at position p sees keys p - left .. p + right of a rectangle bound by positions; None for no
            bound. `right` is 0 at most where the mask is causal.
        start: position of row 0 on the key axis.
        prefix: leading keys that no position hides.
    """

    lists: Lists
    rows: int
    keys: int
    left: int | None
    right: int | None
    start: int
    prefix: int


class Plan(NamedTuple):
    """A plan on its device; a row of the batch follows list `which[b]`, or list 0 where `which` is None.

    Attributes:
        which: (B,) int32, or None where all rows share one list.
        row_bands, key_bands: (lists, T) and (lists, S) int32: the bands that rows and keys lie in.
        entries: (lists, row bands, key bands) int32: `HIDDEN`, `WHOLE` or a shift (`bands.py`).
        seen, whole: (lists, row tiles, key tiles) bool: tiles that hold a pair that is seen, and those seen whole.
    """

    which: Tensor | None
    row_bands: Tensor
    key_bands: Tensor
    entries: Tensor
    seen: Tensor
    whole: Tensor

    def tiles(self) -> tuple[Tensor, Tensor]:
        """`seen` and `whole` for the rows of the batch: (B or 1, row tiles, key tiles)."""
        if self.which is None:
            return self.seen, self.whole
        return self.seen[self.which], self.whole[self.which]


def reason_against_plan(plan: Sequence[Sequence[Rectangle]], rows: int) -> str | None:
    """Why FlexAttention cannot compute a plan, or None."""
    try:
        for rectangles in _apart(plan)[0]:
            kept_bands(rectangles, rows)
    except NotImplementedError as error:
        return str(error)
    return None


def places_of(plan: Sequence[Sequence[Rectangle]], mask: Mask, rows: int, keys: int) -> tuple[Places, tuple[int, ...]]:
    """What decides which tiles are visited, and which of its lists each row of the batch follows.

    An offset held in a tensor is read, which waits for its device.
    """
    lists, which = _apart(plan)
    left, right = mask.window
    if mask.causal:
        right = 0 if right is None else min(right, 0)
    return Places(lists, rows, keys, left, right, mask.start(rows, keys), mask.prefix), which


def plan_of(places: Places, which: tuple[int, ...], device: torch.device) -> Plan:
    """The plan on its device.

    Raises:
        NotImplementedError: FlexAttention cannot compute it; see `bands_of`.
    """
    found = kept_tables(places, device)
    return found if len(places.lists) < 2 else found._replace(which=_on_device(which, device))


def _apart(plan: Sequence[Sequence[Rectangle]]) -> tuple[Lists, tuple[int, ...]]:
    """The lists that differ, and which of them each row of the batch follows. Heads often share one list."""
    known: dict[tuple[Rectangle, ...], int] = {}
    by_identity: dict[int, int] = {}
    for rectangles in plan:
        if id(rectangles) not in by_identity:
            by_identity[id(rectangles)] = known.setdefault(tuple(rectangles), len(known))
    return tuple(known), tuple(by_identity[id(rectangles)] for rectangles in plan)


@functools.lru_cache(maxsize=MOST_KEPT * 4)
def kept_bands(rectangles: tuple[Rectangle, ...], rows: int) -> Bands:
    """`bands_of` one list."""
    return bands_of(rectangles, rows)


@functools.lru_cache(maxsize=MOST_KEPT)
def kept_tables(places: Places, device: torch.device) -> Plan:
    """Everything of a plan but `which`, made on the CPU and copied to the device in one piece each."""
    with torch.inference_mode(False):  # a tensor of inference mode could not be kept for a later gradient
        found = [_tables(kept_bands(rectangles, places.rows), places) for rectangles in places.lists]
        row_bands, key_bands, entries, seen, whole = zip(*found, strict=True)
        most = [max(each.shape[dim] for each in entries) for dim in (0, 1)]
        table = torch.full((len(entries), *most), HIDDEN, dtype=torch.int32, device="cpu")
        for own, each in zip(table, entries, strict=True):
            own[: each.shape[0], : each.shape[1]] = each
        positions = [torch.stack(each).to(device) for each in (row_bands, key_bands)]
        tiles = [torch.stack(each).to(device) for each in (seen, whole)]
        return Plan(None, positions[0], positions[1], table.to(device), tiles[0], tiles[1])


def _tables(bands: Bands, places: Places) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    cuts = bands.key_cuts
    place = {cut: index for index, cut in enumerate(cuts)}
    entries = torch.full((len(bands.runs), len(cuts)), HIDDEN, dtype=torch.int32, device="cpu")
    for row, runs in zip(entries, bands.runs, strict=True):
        for run in runs:
            row[place[run.key_begin] : place[run.key_end]] = run.entry
    return _bands(bands.cuts[:-1], places.rows), _bands(cuts, places.keys), entries, *_reached(bands, places)


def _bands(begins: Sequence[int], length: int) -> Tensor:
    """(length,) int32: the band of every position, the bands beginning at `begins`, the first at 0."""
    positions = torch.arange(length, device="cpu")
    return (torch.bucketize(positions, torch.tensor(begins, device="cpu"), right=True) - 1).to(torch.int32)


def _reached(bands: Bands, places: Places) -> tuple[Tensor, Tensor]:
    """Which tiles hold a pair that is seen, and which are seen whole: (row tiles, key tiles), bool."""
    shape = (-(-places.rows // TILE), -(-places.keys // TILE))
    many = shape[0] * shape[1]
    seen, area = (torch.zeros(many, dtype=torch.int32, device="cpu") for _ in range(2))
    runs = [
        (*edges, *run)
        for edges, found in zip(zip(bands.cuts, bands.cuts[1:], strict=False), bands.runs, strict=True)
        for run in found
    ]
    if not runs:
        return seen.view(shape) > 0, area.view(shape) > 0
    # One piece per run and tile that it touches. The rows of a piece are low .. high, its keys begin .. end.
    table = torch.tensor(runs, device="cpu")
    top, left = table[:, 0] // TILE, table[:, 2] // TILE
    width = (table[:, 3] - 1) // TILE - left + 1
    counts = ((table[:, 1] - 1) // TILE - top + 1) * width
    own = torch.repeat_interleave(counts)
    index = torch.arange(len(own), device="cpu") - (counts.cumsum(0) - counts)[own]
    tile_row, tile_key = top[own] + index // width[own], left[own] + index % width[own]
    low, high = table[own, 0].maximum(tile_row * TILE), table[own, 1].minimum((tile_row + 1) * TILE)
    begin, end = table[own, 2].maximum(tile_key * TILE), table[own, 3].minimum((tile_key + 1) * TILE)
    nearest, farthest = begin - high + 1, end - 1 - low  # of key - row, among the piece's pairs
    position = places.start + table[own, 4]
    some, every = torch.ones_like(own, dtype=torch.bool), torch.ones_like(own, dtype=torch.bool)
    if places.right is not None:
        some, every = some & (nearest <= position + places.right), every & (farthest <= position + places.right)
    if places.left is not None:
        some, every = some & (farthest >= position - places.left), every & (nearest >= position - places.left)
    whole = table[own, 4] == WHOLE
    some, every = some | (begin < places.prefix) | whole, every | (end <= places.prefix) | whole
    tile = tile_row * shape[1] + tile_key
    seen.index_add_(0, tile, some.to(torch.int32))
    area.index_add_(0, tile, ((high - low) * (end - begin) * every).to(torch.int32))
    return seen.view(shape) > 0, area.view(shape) == TILE * TILE


@functools.lru_cache(maxsize=MOST_KEPT * 4)
def _on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.int32, device=device)
