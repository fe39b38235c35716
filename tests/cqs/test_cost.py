"""The cost model against the paper's and our own figures, and the choice of a plan for a budget."""

import pytest

from hf_attn_plugins import cqs
from hf_attn_plugins.cqs.planning import cost

ONE_HEAD = cost.CallShape(heads=1, kv_heads=1, head_dim=1, head_dim_v=1, itemsize=4)
LLAMA = cost.CallShape(heads=32, kv_heads=8, head_dim=128, head_dim_v=128)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("512MiB", 2**29),
        ("8 GB", 8 * 10**9),
        ("1.5gib", 3 * 2**29),
        ("1024", 1024),
        (7, 7),
        ("3 B", 3),
        ("2TiB", 2**41),
    ],
)
def test_amounts_of_memory(text: str, count: int) -> None:
    assert cost.parse_bytes(text) == count


@pytest.mark.parametrize("text", ["", "GiB", "1 XB", "-3MiB", "1e9"])
def test_other_amounts_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="8GiB"):
        cost.parse_bytes(text)


def test_formatting() -> None:
    assert [cost.format_bytes(n) for n in (7, 1536, 2**30, 3 * 2**41)] == ["7 B", "1.50 KiB", "1.00 GiB", "6.00 TiB"]


@pytest.mark.parametrize(
    ("workers", "cqs_moves", "ring", "ulysses"),
    [(4, 2.0, 1.5, 0.75), (7, 1.14, 1.71, 0.49), (8, 1.5, 1.75, 0.44), (13, 0.92, 1.85, 0.28), (31, 0.65, 1.94, 0.13)],
)
def test_bytes_between_devices(workers: int, cqs_moves: float, ring: float, ulysses: float) -> None:
    """In units of one tensor: 4 (m - 1) / W for CQS, 2 (W - 1) / W for ring, 4 (W - 1) / W^2 for Ulysses."""
    tokens = 1000 * workers
    shape = cost.CallShape(heads=1, kv_heads=1, head_dim=1000, head_dim_v=1000, itemsize=4)
    found = cost.across_devices(cqs.plan(tokens, workers), shape)
    unit = tokens * 4000
    assert [found[name][0] / unit for name in ("CQS", "ring", "Ulysses")] == pytest.approx(
        [cqs_moves, ring, ulysses], abs=0.01
    )
    assert found["one device"] == (0, pytest.approx(4 * unit, rel=0.001))


def test_gathered_tokens_are_those_of_the_leaves() -> None:
    for workers in (4, 7, 8, (7, 7), (4, 13)):
        plan = cqs.plan(3000, workers)
        total = sum(leaf.length for leaf in plan.leaves())
        assert total <= cost.gathered_tokens(plan) <= 1.25 * total
        longest, rows = cost.leaf_sizes(plan)
        assert max(leaf.length for leaf in plan.leaves()) <= longest <= 1.05 * max(x.length for x in plan.leaves()) + 20
        assert max(end - begin for leaf in plan.leaves() for begin, end in leaf.ranges) <= rows


def test_streamed_bytes_are_material_and_results() -> None:
    plan = cqs.plan(700, 7)
    # 3 groups of 100 tokens a worker; a token has 4 bytes of query, 8 of key and value, 4 of out and 4 of lse.
    assert cost.streaming_bytes(plan, ONE_HEAD) == 7 * 300 * (4 + 8 + 4 + 4)


def test_tile_streaming() -> None:
    row = 4 + 8 + 4  # query, out with lse, accumulator
    budget = 100 * row + 2 * 700 * 8
    assert cost.tile_streaming_bytes(700, ONE_HEAD, budget, 0, False) == 700 * 12 + 7 * 700 * 8
    assert cost.tile_streaming_bytes(700, ONE_HEAD, budget, 0, True) == 700 * 12 + 28 * 100 * 8
    assert cost.tile_streaming_bytes(700, ONE_HEAD, 2 * 700 * 8, 0, True) is None


def test_a_plan_that_fits_is_chosen() -> None:
    chosen = []
    for budget in ("64GiB", "8GiB", "2GiB", "1GiB", "256MiB", "150MiB"):
        plan = cost.choose(1_000_000, LLAMA, cost.parse_bytes(budget), cost.WORKSPACE)
        assert cost.streaming_peak(plan, LLAMA, cost.WORKSPACE) <= cost.parse_bytes(budget)
        chosen.append([level.num_workers for level in plan.levels])
    assert chosen[0] == [1] and len(chosen[-1]) == 2  # everything at once; recursion where one level is too coarse
    gathered = [cost.gathered_tokens(cqs.plan(1_000_000, workers)) for workers in chosen]
    assert gathered == sorted(gathered)


def test_a_budget_that_nothing_fits_names_what_would() -> None:
    with pytest.raises(ValueError, match=r"smallest division, workers .* needs [\d.]+ [MG]iB"):
        cost.choose(1_000_000, LLAMA, 2**20, 0)
