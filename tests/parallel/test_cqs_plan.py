"""CQS over ranks, planned: every pair once, sends that match receives, and bytes counted pair of ranks by pair."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_plugins.cqs.planning.cost import CallShape
from hf_attn_plugins.parallel.cqs_plan import RankPlan, choose_workers, rank_plan

SHAPE = CallShape(heads=4, kv_heads=2, head_dim=6, head_dim_v=5, itemsize=2, batch=3)


@st.composite
def plans(draw: Any) -> RankPlan:
    ranks = draw(st.integers(1, 8))
    workers = draw(st.one_of(st.none(), st.integers(ranks, 33)))
    tokens = draw(st.integers(0, 90))
    chosen = workers or choose_workers(tokens, ranks)
    rounds = draw(st.integers(1, -(-chosen // ranks)))
    reach = draw(st.one_of(st.none(), st.integers(0, 40)))
    return rank_plan(tokens, ranks, workers, None, draw(st.booleans()), rounds, reach)


def positions(spans: Any) -> set[int]:
    return {token for begin, end in spans for token in range(begin, end)}


@settings(deadline=None, max_examples=60)
@given(plans())
def test_shards_are_the_sequence_and_no_rank_is_without_workers(plan: RankPlan) -> None:
    ends = [end for shard in plan.shards for end in shard]
    assert ends[0] == 0 and ends[-1] == plan.num_tokens
    assert ends[1:-1:2] == ends[2:-1:2] and ends == sorted(ends)
    dealt = [plan.workers(rank) for rank in range(plan.num_ranks)]
    assert [w for mine in dealt for w in mine] == list(range(plan.num_workers)) and all(dealt)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


@settings(deadline=None, max_examples=40)
@given(plans())
def test_every_pair_is_computed_once_by_a_rank_that_holds_it(plan: RankPlan) -> None:
    seen: dict[tuple[int, int], int] = {}
    for rank in range(plan.num_ranks):
        own, count = positions([plan.shards[rank]]), 0
        for index in range(plan.num_rounds):
            others = range(plan.num_ranks)
            rows = own | positions(s for o in others for s in plan.rows_moved(index, o, rank))
            keys = own | positions(s for o in others for s in plan.keys_moved(index, o, rank))
            for leaf in plan.rounds[index][rank].leaves:
                for piece in leaf.pieces(plan.is_causal):
                    for row in range(*piece.rows):
                        for key in positions(piece.keys):
                            if plan.is_causal and key > row:
                                assert piece.causal
                                continue
                            assert row in rows and key in keys
                            seen[row, key] = seen.get((row, key), 0) + 1
                            count += 1
        assert count == plan.pairs(rank)
    n = plan.num_tokens
    everything = {(row, key) for row in range(n) for key in range(row + 1 if plan.is_causal else n)}
    reach = n if plan.reach is None else plan.reach
    wanted = {(row, key) for row, key in everything if row - key <= reach}
    assert wanted <= set(seen) <= everything and set(seen.values()) <= {1}
    assert plan.reach is not None or set(seen) == everything


@settings(deadline=None, max_examples=60)
@given(plans())
def test_nothing_moves_that_is_not_read_and_what_is_sent_is_received(plan: RankPlan) -> None:
    ranks = range(plan.num_ranks)
    for index in range(plan.num_rounds):
        for rank in ranks:
            leaves = plan.rounds[index][rank].leaves
            pieces = [piece for leaf in leaves for piece in leaf.pieces(plan.is_causal)]
            own = positions([plan.shards[rank]])
            moved = [[s for o in ranks for s in find(index, o, rank)] for find in (plan.rows_moved, plan.keys_moved)]
            assert positions(moved[0]) == positions(p.rows for p in pieces) - own
            assert positions(moved[1]) == positions(k for p in pieces for k in p.keys) - own
            assert all(len(spans) == len(set(spans)) for spans in moved), "a group moves once a round"
    for volume in (plan.inputs, plan.results, plan.result_gradients, plan.input_gradients):
        assert sum(volume(r, SHAPE).sent for r in ranks) == sum(volume(r, SHAPE).received for r in ranks)


def test_bytes_by_hand() -> None:
    """W = R = 4, I = {0, 1, 2}, 8 tokens, causal: workers keep (0,1)(0,2), (1,2)(1,3), (2,3), (0,3) and themselves."""
    plan = rank_plan(8, 4)
    assert plan.num_workers == 4 and plan.shards == ((0, 2), (2, 4), (4, 6), (6, 8))
    assert [[s for o in range(4) for s in plan.rows_moved(0, o, r)] for r in range(4)] == [
        [(2, 4), (4, 6)], [(4, 6), (6, 8)], [(6, 8)], [],
    ]  # fmt: skip
    assert [[s for o in range(4) for s in plan.keys_moved(0, o, r)] for r in range(4)] == [[], [], [], [(0, 2)]]
    query, key, result = 3 * 4 * 6 * 2, 3 * 2 * 11 * 2, 3 * 4 * (5 * 2 + 4)
    assert [plan.inputs(r, SHAPE).received for r in range(4)] == [4 * query, 4 * query, 2 * query, 2 * key]
    assert [plan.inputs(r, SHAPE).sent for r in range(4)] == [2 * key, 2 * query, 4 * query, 4 * query]
    assert [plan.results(r, SHAPE).sent for r in range(4)] == [4 * result, 4 * result, 2 * result, 0]
    assert [plan.result_gradients(r, SHAPE).received for r in range(4)] == [
        tokens * (result + 3 * 4 * 4) for tokens in (4, 4, 2, 0)
    ]
    assert [plan.pairs(r) for r in range(4)] == [11, 11, 7, 7]


@pytest.mark.parametrize("ranks", range(1, 9))
def test_causal_work_is_balanced_without_zigzag(ranks: int) -> None:
    """Odd numbers of workers in equal shares are balanced but for the diagonals; even ones within 1 / W."""
    tokens = 5040
    for workers in {ranks, 3 * ranks, choose_workers(tokens, ranks)}:
        plan = rank_plan(tokens, ranks, workers)
        limit = 1.0 if workers % 2 and tokens % workers == 0 else 1 + 1 / workers
        assert plan.balance() <= limit + 0.01
    assert choose_workers(tokens, ranks) % ranks == 0 or ranks == 1


@pytest.mark.parametrize(("ranks", "workers"), [(4, 31), (3, 31), (8, 31)])
def test_rounds_bound_what_is_held(ranks: int, workers: int) -> None:
    """31 workers on 4 ranks: one round moves least, a round for every worker holds little more than its own quorum."""
    most = -(-workers // ranks)
    once, slowly = (rank_plan(3100, ranks, workers, rounds=rounds) for rounds in (1, most))
    group = 100
    for rank in range(ranks):
        assert once.inputs(rank, SHAPE).received <= slowly.inputs(rank, SHAPE).received
        own = len(slowly.workers(rank)) * group
        assert all(held <= own + 6 * group for held in slowly.tokens_held(rank))
        assert slowly.pairs(rank) == once.pairs(rank)


def test_a_window_moves_neighbouring_groups_only() -> None:
    """100 tokens a rank, each of which sees 50 before it: one group in each direction, whatever the length."""
    plan = rank_plan(800, 8, 8, reach=50)
    for rank in range(8):
        moved = [s for o in range(8) for find in (plan.rows_moved, plan.keys_moved) for s in find(0, o, rank)]
        assert all(min(abs(s[0] - e) for e in plan.shards[rank]) == 0 or s[1] in plan.shards[rank] for s in moved)
    whole = rank_plan(800, 8, 8)
    assert sum(plan.inputs(r, SHAPE).sent for r in range(8)) < sum(whole.inputs(r, SHAPE).sent for r in range(8)) / 2
    assert sum(plan.pairs(r) for r in range(8)) == 8 * 5050 + 7 * 10000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((10, 4, 3), "workers=3 on 4 ranks"),
        ((10, 0), "0 ranks"),
        ((-1, 2), "num_tokens=-1"),
        ((10, 2, 7, (0, 1, 2)), "0, 1, 2"),
    ],
)
def test_bad_plans_are_refused(arguments: tuple[Any, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rank_plan(*arguments)
    with pytest.raises(ValueError, match=r"1 \.\. 2 rounds"):
        rank_plan(10, 4, 7, rounds=3)
