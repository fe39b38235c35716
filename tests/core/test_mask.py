"""Masks: the structure against pair-by-pair visibility, trimming, and the tiles that are left of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_plugins.core.mask import Mask, padding_from_lengths, window_of
from hf_attn_plugins.kernels.cpu.tile_map import TileMap
from hf_attn_plugins.testing import visibility

sides = st.one_of(st.none(), st.integers(0, 12))


@st.composite
def cases(draw):
    rows, keys = draw(st.integers(1, 18)), draw(st.integers(1, 18))
    fields = dict(
        is_causal=draw(st.booleans()),
        window=(draw(sides), draw(sides)),
        offset=draw(st.one_of(st.none(), st.integers(-10, 20))),
        prefix=draw(st.sampled_from([0, 0, 1, 5])),
    )
    if draw(st.booleans()):
        fields["key_padding"] = torch.tensor([draw(st.lists(st.booleans(), min_size=keys, max_size=keys))])
    if draw(st.booleans()):
        fields["query_segments"] = torch.tensor(
            [sorted(draw(st.lists(st.integers(0, 3), min_size=rows, max_size=rows)))]
        )
        fields["key_segments"] = torch.tensor([sorted(draw(st.lists(st.integers(0, 3), min_size=keys, max_size=keys)))])
    return rows, keys, fields


def mask_of(fields):
    fields = dict(fields)
    return Mask(causal=fields.pop("is_causal"), **fields)


@settings(deadline=None, max_examples=150)
@given(cases())
def test_visible_is_the_definition(case):
    rows, keys, fields = case
    mask = mask_of(fields)
    got = mask.visible(torch.arange(rows), torch.arange(keys), mask.start(rows, keys))
    assert torch.equal(got.expand(1, 1, rows, keys), visibility(rows, keys, **fields))


@settings(deadline=None, max_examples=150)
@given(cases())
def test_trimming_loses_no_visible_pair(case):
    rows, keys, fields = case
    trimmed, kept = mask_of(fields).trimmed(rows, keys)
    width = kept.stop - kept.start
    whole = torch.zeros(1, 1, rows, keys, dtype=torch.bool)
    if width:
        seen = trimmed.visible(torch.arange(rows), torch.arange(width), trimmed.start(rows, width))
        whole[..., kept] = seen.expand(1, 1, rows, width)
    assert torch.equal(whole, visibility(rows, keys, **fields))


@settings(deadline=None, max_examples=200)
@given(cases(), st.integers(1, 7), st.integers(1, 7))
def test_tiles_cover_every_visible_pair_once_and_know_their_edges(case, row_tile, key_tile):
    rows, keys, fields = case
    expected = visibility(rows, keys, **fields)[0, 0]
    tiles = TileMap(mask_of(fields), rows, keys, row_tile, key_tile)
    covered = torch.zeros(rows, keys, dtype=torch.int)
    for index, (t0, t1) in enumerate(tiles.row_tiles):
        for tile in tiles.keys_of(index):
            covered[t0:t1, tile.begin : tile.end] += 1
            if not tile.needs_mask:
                assert expected[t0:t1, tile.begin : tile.end].all(), "a tile without mask arithmetic hides nothing"
    assert (covered <= 1).all()
    assert (covered[expected] == 1).all()


def test_causal_tiles_stop_at_the_diagonal():
    tiles = TileMap(Mask(causal=True), 64, 64, 16, 16)
    assert sum(len(tiles.keys_of(i)) for i in range(4)) == 4 + 3 + 2 + 1
    assert [t.needs_mask for t in tiles.keys_of(3)] == [False, False, False, True]


def test_windows_and_padding_skip_tiles():
    assert [len(TileMap(Mask(causal=True, window=(7, None)), 64, 64, 16, 16).keys_of(i)) for i in range(4)] == [
        1,
        2,
        2,
        2,
    ]
    padding = padding_from_lengths(torch.tensor([20]), 64, "left")
    assert TileMap(Mask(causal=True, key_padding=padding), 64, 64, 16, 16).keys_of(1) == []


def test_window_of():
    assert window_of(None) == (None, None)
    assert window_of(4) == (3, None)
    assert window_of((2, 3)) == (2, 3)
    for bad in (0, -1, (1, 2, 3), (-1, None)):
        with pytest.raises(ValueError):
            window_of(bad)


def test_padding_from_lengths():
    lengths = torch.tensor([0, 2, 3])
    assert padding_from_lengths(lengths, 3).int().tolist() == [[0, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert padding_from_lengths(lengths, 3, "left").int().tolist() == [[0, 0, 0], [0, 1, 1], [1, 1, 1]]
    with pytest.raises(ValueError, match="left"):
        padding_from_lengths(lengths, 3, "both")


def test_replace_refuses_unknown_fields():
    with pytest.raises(TypeError, match="no field"):
        Mask().replace(causl=True)


@pytest.mark.parametrize("left", range(40))
def test_a_window_s_first_key_is_visited_wherever_its_tile_ends(left):
    """For windows of every size: every pair that may be seen lies in a tile that is visited, the first key included."""
    tiles = TileMap(Mask(causal=True, window=(left, None)), 64, 64, 16, 16)
    for index, (begin, end) in enumerate(tiles.row_tiles):
        visited = {key for tile in tiles.keys_of(index) for key in range(tile.begin, tile.end)}
        assert visited >= {key for row in range(begin, end) for key in range(max(0, row - left), row + 1)}
