"""The textbook tile plan: block sizes, coverage, order and traffic against counts made pair by pair."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_plugins.tiled.plan import ORDERS, TilePlan, floored_blocks


@st.composite
def plans(draw, max_length=40):
    head_dim = draw(st.integers(1, 9))
    sram = draw(st.integers(4 * head_dim, 4 * head_dim * 12))
    return TilePlan(
        draw(st.integers(1, max_length)), head_dim, sram, draw(st.booleans()), draw(st.sampled_from(ORDERS))
    )


@given(plans())
@settings(max_examples=150, deadline=None)
def test_tiles_cover_every_visible_pair_exactly_once(plan):
    seen = [(t, s) for tile in plan.tiles() for t in tile.rows for s in tile.keys if not plan.causal or s <= t]
    assert sorted(seen) == [(t, s) for t in range(plan.length) for s in range(plan.length) if not plan.causal or s <= t]


@given(plans())
@settings(max_examples=150, deadline=None)
def test_no_tile_is_needless_and_masks_are_where_pairs_are_hidden(plan):
    tiles = list(plan.tiles())
    for tile in tiles:
        hidden = [plan.causal and s > t for t in tile.rows for s in tile.keys]
        assert not all(hidden) and any(hidden) == tile.masked
        assert len(tile.rows) <= plan.block_rows and len(tile.keys) <= plan.block_keys
    every = plan.num_row_blocks * plan.num_key_blocks
    assert plan.count() == (len(tiles), sum(tile.masked for tile in tiles), every - len(tiles))


@given(plans())
@settings(max_examples=150, deadline=None)
def test_both_orders_do_the_same_tiles(plan):
    by_keys = list(TilePlan(plan.length, plan.head_dim, plan.sram, plan.causal, "keys-outer").tiles())
    by_rows = list(TilePlan(plan.length, plan.head_dim, plan.sram, plan.causal, "rows-outer").tiles())
    assert by_keys == sorted(by_rows, key=lambda tile: (tile.key_block, tile.row_block))
    assert by_rows == sorted(by_keys, key=lambda tile: (tile.row_block, tile.key_block))


@given(plans())
@settings(max_examples=150, deadline=None)
def test_traffic_counted_tile_by_tile(plan):
    n, d = plan.length, plan.head_dim
    read = written = 0
    resident = None  # the block the outer loop keeps in fast memory
    if plan.order == "keys-outer":
        written += n * d + 2 * n
        for tile in plan.tiles():
            if tile.key_block != resident:
                read, resident = read + 2 * len(tile.keys) * d, tile.key_block
            read += len(tile.rows) * (2 * d + 2)
            written += len(tile.rows) * (d + 2)
    else:
        for tile in plan.tiles():
            if tile.row_block != resident:
                read, resident = read + len(tile.rows) * d, tile.row_block
                written += len(tile.rows) * (d + 1)
            read += 2 * len(tile.keys) * d
    assert (plan.traffic().read, plan.traffic().written) == (read, written)


@given(plans(max_length=200))
@settings(max_examples=100, deadline=None)
def test_block_sizes_are_the_papers(plan):
    assert plan.block_keys == math.ceil(plan.sram / (4 * plan.head_dim))
    assert plan.block_rows == min(math.ceil(plan.sram / (4 * plan.head_dim)), plan.head_dim)


def test_known_example():
    plan = TilePlan(6, 3, 24)
    assert (plan.block_keys, plan.block_rows, plan.count()) == (2, 2, (9, 0, 0))
    assert TilePlan(6, 2, 20).block_keys == 3  # ceil(20 / 8), where floor gives 2
    assert (plan.plain_traffic().read, plan.plain_traffic().written) == (3 * 18 + 2 * 36, 2 * 36 + 18)
    # Largest step: K, V, Q, O of 2 x 3 each, 2 x 2 scores, two numbers a row.
    assert plan.held() == 4 * 6 + 4 + 4


def test_tiles_pay_at_lengths_that_matter():
    toy, real = TilePlan(6, 3, 24), TilePlan(4096, 64, 25600)
    assert toy.traffic().total > toy.plain_traffic().total
    assert real.traffic().total < 0.6 * real.plain_traffic().total


def test_floor_and_an_even_split_break_the_budget():
    block, sizes = floored_blocks(7, 3, 24)
    assert (block, sizes) == (2, [3, 2, 2])  # one block of 3 where 2 fit
    assert floored_blocks(1, 3, 24) == (2, [])
    assert floored_blocks(6, 3, 11) == (0, [])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((0, 3, 24), "length=0"),
        ((6, 0, 24), "head_dim=0"),
        ((6, 3, 11), "sram=11.*takes 12 elements"),
        ((6, 3, 24, False, "inside-out"), "inside-out.*keys-outer, rows-outer"),
    ],
)
def test_sizes_that_do_not_fit_are_named(sizes, message):
    with pytest.raises(ValueError, match=message):
        TilePlan(*sizes)
