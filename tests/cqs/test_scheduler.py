"""The Scheduler against the paper's printed lists, and its properties for any number of workers and tokens."""

import ast
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_plugins import cqs
from hf_attn_plugins.cqs.planning import difference_covers as covers
from hf_attn_plugins.cqs.planning.worker_share import Leaf
from hf_attn_plugins.cqs.show import text as show
from tests.steps import steps

# Printed by the paper's notebook for N = 11, W = 7, interest set (0, 1, 5). Its reindexed ban list lost worker 4's
# entry, which equals worker 3's; it is put back here.
PRINTED = Path(__file__).with_name("paper_lists.txt").read_text()


def entries(lines: Iterator[str]) -> dict[str, object]:
    """Title -> parsed list, in order, from text in which every title is followed by its list."""
    found: dict[str, object] = {}
    title, body = "", ""
    for line in [*lines, "END"]:
        if line[:1].isalpha():
            if body:
                found[title] = ast.literal_eval(body)
            title, body = line, ""
        elif line[:1] in "[({":
            body += line
    return found


def test_every_list_of_the_paper_s_notebook_in_order() -> None:
    printed = entries(show.scheduler(cqs.plan(11, 7, (0, 1, 5)), 5))
    expected = entries(iter(PRINTED.splitlines()))
    assert len(expected) == 10 and list(printed) == list(expected)
    for title, content in expected.items():
        assert printed[title] == content, title


def test_lists_of_the_paper_figure_5() -> None:
    plan = cqs.plan(10, 7, (0, 1, 3))
    assert plan.material == [
        [0, 1, 3], [1, 2, 4, 5], [2, 3, 6, 7], [3, 4, 5, 8, 9], [0, 4, 5, 6, 7], [1, 6, 7, 8, 9], [0, 2, 8, 9],
    ]  # fmt: skip
    assert sorted(plan.bans(4)) == [(0, 0), (6, 6), (6, 7), (7, 6), (7, 7)]
    assert sorted(plan.local_bans(4)) == [(0, 0), (3, 3), (3, 4), (4, 3), (4, 4)]


def test_lists_of_the_paper_table_1() -> None:
    plan = cqs.plan(4, 4, (0, 1, 2))
    assert plan.distilled_pairs == [[(0, 1), (0, 2)], [(1, 2), (1, 3)], [(2, 3)], [(0, 3)]]
    assert plan.distilled_quorums == [[0, 1, 2], [1, 2, 3], [2, 3], [0, 3]]


@pytest.mark.parametrize(
    ("tokens", "longest"),
    [(49_000, {4: 36_750, 7: 21_000, 8: 24_500, 31: 9_486}), (10_000, {4: 7_500, 7: 4_287, 8: 5_000})],
)
def test_longest_subsequences_of_the_paper(tokens: int, longest: dict[int, int]) -> None:
    assert {w: max(cqs.plan(tokens, w).lengths) for w in longest} == longest


def computed(leaves: Iterator[Leaf], tokens: int, is_causal: bool) -> np.ndarray:
    """How often each pair is computed, by going through the kernel calls."""
    counts = np.zeros((tokens, tokens), dtype=int)
    for leaf in leaves:
        before = counts.sum()
        for (t0, t1), keys, causal in leaf.pieces(is_causal):
            for s0, s1 in keys:
                block = np.ones((t1 - t0, s1 - s0), dtype=int)
                if causal and s1 == t1:
                    block = np.tril(block, s1 - s0 - (t1 - t0))
                counts[t0:t1, s0:s1] += block
        assert counts.sum() - before == leaf.cells(is_causal)
    return counts


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(0, 90))
def test_every_pair_exactly_once(workers: int, tokens: int) -> None:
    plan = cqs.plan(tokens, workers)
    everything = np.ones((tokens, tokens), dtype=int)
    assert (computed(plan.leaves(), tokens, False) == everything).all()
    assert (computed(plan.leaves(), tokens, True) == np.tril(everything)).all()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 13), min_size=2, max_size=3), st.integers(0, 80))
def test_every_pair_exactly_once_in_a_recursive_plan(workers: list[int], tokens: int) -> None:
    plan = cqs.plan(tokens, workers)
    everything = np.ones((tokens, tokens), dtype=int)
    assert (computed(plan.leaves(), tokens, False) == everything).all()
    assert (computed(plan.leaves(), tokens, True) == np.tril(everything)).all()
    assert all(leaf.cells() and all(map(any, leaf.keep)) and len(leaf.path) == len(workers) for leaf in plan.leaves())


def test_every_pair_of_groups_belongs_to_one_worker_up_to_200() -> None:
    for workers in range(1, 201):
        plan = cqs.plan(0, workers)
        pairs = sorted(pair for kept in plan.distilled_pairs for pair in kept)
        assert pairs == [(a, b) for a in range(workers) for b in range(a + 1, workers)]
        counts = [len(kept) for kept in plan.distilled_pairs]
        assert max(counts) - min(counts) <= 1
        assert all(w in quorum for w, quorum in enumerate(plan.distilled_quorums))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(0, 70))
def test_tasks_and_bans_make_up_the_workers_matrix(workers: int, tokens: int) -> None:
    plan = cqs.plan(tokens, workers)
    tasks = [pair for w in range(workers) for pair in plan.tasks(w)]
    assert len(tasks) == tokens**2 == len(set(tasks))
    for w, material in enumerate(plan.material):
        bans = plan.bans(w)
        assert len(material) == plan.lengths[w]
        assert set(plan.tasks(w)) | set(bans) == {(a, b) for a in material for b in material}
        assert len(plan.tasks(w)) + len(bans) == len(material) ** 2
        assert [(material[a], material[b]) for a, b in plan.local_bans(w)] == bans


@given(st.integers(0, 10_000), st.integers(1, 200))
def test_groups_are_consecutive_and_even(tokens: int, workers: int) -> None:
    groups = cqs.plan(tokens, workers).token_groups
    sizes = [len(group) for group in groups]
    assert sizes == sorted(sizes) and max(sizes) - min(sizes) <= 1
    assert [t for group in groups for t in group] == list(range(tokens))


def test_causal_work_is_balanced_for_odd_numbers_of_workers() -> None:
    for workers in range(1, 112, 2):
        for extra in (0, workers // 2):
            assert cqs.plan(50 * workers + extra, workers).balance(is_causal=True) <= 1.05, (workers, extra)


def test_balance_sees_an_uneven_plan() -> None:
    assert cqs.plan(4000, 4).balance() == pytest.approx(1.25, abs=0.01)


def test_even_differences_go_to_the_first_half_of_the_workers() -> None:
    assert [len(pairs) for pairs in cqs.plan(0, 8).distilled_pairs] == [4] * 4 + [3] * 4


def test_shifted_sets_without_the_own_group_are_exact_too() -> None:
    plan = cqs.plan(23, 7, (1, 2, 4))
    assert (computed(plan.leaves(), 23, False) == 1).all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        cqs.plan(-1, 3)
    with pytest.raises(ValueError, match="at least 1 worker"):
        cqs.plan(5, 0)
    with pytest.raises(ValueError, match="no difference cover"):
        cqs.plan(5, 7, (0, 1, 2))
    with pytest.raises(ValueError, match="per level"):
        cqs.plan(5, (3, 3), ((0, 1),))
    with pytest.raises(ValueError, match="per level"):
        cqs.plan(5, ())


def test_a_plan_takes_as_many_steps_for_ten_million_tokens_as_for_few() -> None:
    def made(tokens: int) -> tuple[int, float]:
        plan = cqs.plan(tokens, 133)
        return max(plan.lengths), plan.balance(is_causal=True)

    longest, balance = made(10_000_000)
    assert longest == 902_256 and balance < 1.001
    assert steps(lambda: made(10_000_000)) <= 1.1 * steps(lambda: made(10_000)) + 1000


def test_default_workers_are_singer_sizes() -> None:
    from hf_attn_plugins.cqs.planning.scheduler import default_workers

    assert [default_workers(n) for n in (1, 8192, 13 * 1024, 40_000, 10**7)] == [7, 7, 13, 31, 31]
    assert all(covers.singer(default_workers(n)) for n in range(1, 50_000, 997))
