"""The costs: they count what the forms do, and the choice between them follows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from hf_attn_plugins.indexed import build_tables, direct_attention, indexed_attention
from hf_attn_plugins.indexed.plan import CallSizes, direct_cost, prefers_tables, table_cost

from .cases import draw, draw_words

SIZES = st.builds(
    CallSizes,
    words=st.integers(0, 40),
    length=st.integers(1, 12),
    characters=st.integers(2, 30),
    width=st.integers(1, 16),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 8),
)


def test_products_are_those_that_pytorch_counts():
    s = CallSizes(words=6, length=7, characters=11, width=16, heads=2)
    table, positions, own, _ = draw(s.characters, s.length, s.width, 16, tied=True)
    indices = draw_words(s.words, s.length, s.characters)
    with FlopCounterMode(display=False) as counter:
        indexed_attention(build_tables(table, positions, own, heads=2), indices)
    cost = table_cost(s)
    assert counter.get_total_flops() == 2 * (cost.projections + cost.scores + cost.values)
    with FlopCounterMode(display=False) as counter:
        direct_attention(table, positions, indices, own, heads=2)
    cost = direct_cost(s)
    assert counter.get_total_flops() == 2 * (cost.projections + cost.scores + cost.values)


@settings(deadline=None, max_examples=50)
@given(SIZES)
def test_frozen_tables_never_cost_more(sizes):
    assert table_cost(sizes, frozen=True).total <= table_cost(sizes).total
    assert table_cost(sizes, frozen=True).projections == 0


@settings(deadline=None, max_examples=50)
@given(SIZES, st.integers(1, 100))
def test_more_characters_never_make_tables_cheaper(sizes, more):
    larger = CallSizes(sizes.words, sizes.length, sizes.characters + more, sizes.width, sizes.heads, sizes.head_dim)
    assert table_cost(larger).total >= table_cost(sizes).total
    assert direct_cost(larger) == direct_cost(sizes)


def test_tables_win_at_the_seeds_sizes_and_lose_at_the_ends():
    assert prefers_tables(CallSizes(500, 32, 64, 512))
    assert not prefers_tables(CallSizes(1, 32, 64, 512))
    assert prefers_tables(CallSizes(1, 32, 64, 512), frozen=True)
    assert not prefers_tables(CallSizes(500, 32, 50_000, 512))


@pytest.mark.parametrize("name", ["length", "characters", "width", "heads"])
def test_empty_sizes_are_refused(name):
    good = {"words": 1, "length": 1, "characters": 1, "width": 1, "heads": 1}
    with pytest.raises(ValueError, match=f"{name}=0"):
        CallSizes(**{**good, name: 0})


def test_draw_words_covers_padding():
    words = draw_words(5, 7, 11)
    assert (words[0] > 0).all() and (words[1] == 0).all() and torch.equal(words, draw_words(5, 7, 11))
