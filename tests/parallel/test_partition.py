"""Dealing: everything once, as evenly as can be."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_plugins.parallel import partition as dealing

COUNT, RANKS = st.integers(0, 200), st.integers(1, 9)
SETTINGS = settings(deadline=None, max_examples=200)


@given(COUNT, RANKS)
@SETTINGS
def test_contiguous_runs_cover_everything_in_order(count, ranks):
    runs = dealing.contiguous(count, ranks)
    assert len(runs) == ranks and [i for run in runs for i in run] == list(range(count))
    assert max(map(len, runs)) - min(map(len, runs)) <= 1
    assert [len(run) for run in runs] == sorted((len(run) for run in runs), reverse=True)


@given(COUNT, st.integers(1, 30), RANKS)
@SETTINGS
def test_blocks_are_dealt_once_and_evenly(context, size, ranks):
    def tokens(runs):
        return [max(0, min(run.stop * size, context) - run.start * size) for run in runs]

    runs, count = dealing.blocks(context, size, ranks), -(-context // size)
    assert [i for run in runs for i in run] == list(range(count)) and len(runs) == ranks
    assert sum(tokens(runs)) == context
    assert not context or 0 in runs[0], "the anchor is on the first rank"
    assert max(tokens(runs)) <= max(tokens(dealing.contiguous(count, ranks)))
    if count > ranks and count % ranks == 1:
        assert max(tokens(runs)) < (count // ranks + 1) * size or not context % size, "the ragged block is the one more"


@given(COUNT, RANKS)
@SETTINGS
def test_mirrored_runs_cover_everything_and_balance_causal_pairs(count, ranks):
    dealt = dealing.mirrored(count, ranks)
    assert sorted(i for runs in dealt for run in runs for i in run) == list(range(count))
    for runs in dealt:
        assert all(runs) and all(a.stop < b.start for a, b in itertools.pairwise(runs))
    pairs = [sum(i + 1 for run in runs for i in run) for runs in dealt]
    # Two runs whose lengths are off by one at worst, each token with at most `count` pairs.
    assert max(pairs) - min(pairs) <= 2 * count + 1


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), COUNT)
@SETTINGS
def test_level_reaches_the_lowest_possible_peak(loads, count):
    runs = dealing.level(loads, count)
    assert [i for run in runs for i in run] == list(range(count))
    after = [load + len(run) for load, run in zip(loads, runs)]
    assert max(after) == max(max(loads), -(-(sum(loads) + count) // len(loads))), (loads, after)
    # Whoever got something is not above anyone who could have had it instead.
    assert all(after[r] <= min(after) + 1 for r, run in enumerate(runs) if run)


@given(RANKS, st.integers(0, 60))
@SETTINGS
def test_single_tokens_go_round(ranks, steps):
    loads, owners = [0] * ranks, []
    for _ in range(steps):
        (owner,) = [rank for rank, run in enumerate(dealing.level(loads, 1)) if run]
        owners.append(owner)
        loads[owner] += 1
    assert owners == [step % ranks for step in range(steps)]


def test_examples_in_the_docstrings():
    assert dealing.contiguous(7, 3) == [range(3), range(3, 5), range(5, 7)]
    assert dealing.blocks(34, 8, 2) == [range(2), range(2, 5)]
    assert dealing.mirrored(8, 2) == [[range(2), range(6, 8)], [range(2, 6)]]
    assert dealing.level([5, 3, 3], 3) == [range(0), range(2), range(2, 3)]


@pytest.mark.parametrize("deal", [dealing.contiguous, dealing.mirrored, lambda n, w: dealing.level([0] * w, n)])
def test_impossible_deals_are_refused(deal):
    with pytest.raises(ValueError, match="at least 1 process"):
        deal(3, 0)
    with pytest.raises(ValueError, match="0 or more"):
        deal(-1, 2)
