"""Later turns dealt over the ranks: against dense attention, against one process, and against the formulas of cost."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_plugins.cqs.planning.cost import CallShape
from hf_attn_plugins.kernels.bound_attend import BoundAttend
from hf_attn_plugins.parallel import turns
from hf_attn_plugins.parallel.link import Wire, least_turn
from hf_attn_plugins.parallel.method import Step
from hf_attn_plugins.star.cost import ModelShape
from hf_attn_plugins.testing import dense_attention, sharp_inputs
from tests.parallel import cases
from tests.parallel.processes import ranks as started
from tests.parallel.threads import on_threads

HEADS, KV_HEADS, DIM, DIM_V = 4, 2, 4, 6
LOADS = st.lists(st.integers(0, 9), min_size=2, max_size=5)


@given(LOADS, st.integers(0, 40))
def test_every_token_is_dealt_once_and_the_emptiest_rank_gets_most(loads: list[int], count: int) -> None:
    dealt = turns.dealt_runs(count, loads)
    assert sorted(itertools.chain(*itertools.chain(*dealt))) == list(range(count))
    shares = [sum(map(len, runs)) for runs in dealt]
    assert max(shares) - min(shares) <= 1
    for one, other in itertools.permutations(range(len(loads)), 2):
        assert loads[one] >= loads[other] or shares[one] >= shares[other]


@given(LOADS, st.integers(1, 17), st.none() | st.integers(0, 12), st.integers(0, 2**16))
@settings(deadline=None, max_examples=60)
def test_a_dealt_turn_is_dense_attention(loads: list[int], count: int, window: int | None, seed: int) -> None:
    """Keys at any place of any rank, padding anywhere, ranks without keys."""
    batch, first, size = 2, sum(loads), len(loads)
    total, generator = first + count, torch.Generator().manual_seed(seed)
    query, key, value = sharp_inputs(
        batch, HEADS, KV_HEADS, total, total, DIM, DIM_V, dtype=torch.float64, sharpness=1.5
    )
    real = torch.rand(batch, total, generator=generator) < 0.8
    old = torch.randperm(first, generator=generator).split(loads)

    def work(group):
        layout = turns.deal(batch, count, loads, group.rank)
        if layout is None:
            return None
        own = layout.columns[0] + first
        held = torch.cat([old[group.rank], own])
        columns = torch.where(real[:, held], held, -1)
        step = Step(first, columns[:, len(old[group.rank]) :], layout, columns, True, layout.fresh)
        given = query[:, :, own], key[:, :, held], value[:, :, held]
        return own, turns.attention(*given, (window, None), step, BoundAttend(DIM**-0.5), group)

    found = on_threads(size, work)
    if count < size:
        assert found == [None] * size, "all ranks must take the same way"
        return
    place = torch.arange(total)
    seen = (place <= place[first:, None]) & real[:, None, None, :]
    if window is not None:
        seen = seen & (place[first:, None] - place <= window)
    wanted, lse = dense_attention(query[:, :, first:], key, value, seen)
    rows = torch.cat([own for own, _ in found])
    assert sorted(rows.tolist()) == list(range(first, total))
    out = torch.cat([part.out for _, part in found], 2)
    assert (out - wanted[:, :, rows - first]).abs().max() <= 1e-10
    assert torch.allclose(torch.cat([part.lse for _, part in found], 2), lse[:, :, rows - first], rtol=1e-10)


@given(LOADS, st.integers(1, 17))
def test_pairs_rows_and_keys_are_those_of_the_visibility_matrix(loads: list[int], count: int) -> None:
    """Counted pair by pair; each result travels once to each rank, or from each rank to its owner."""
    shape, size, first = CallShape(HEADS, KV_HEADS, DIM, DIM_V, 2, batch=3), len(loads), sum(loads)
    if count < size:
        with pytest.raises(ValueError, match=f"{count} tokens are too few"):
            turns.costs(count, loads, shape)
        return
    for is_dealt in (True, False):
        found = turns.costs(count, loads, shape, is_dealt=is_dealt)
        seen = sum(first + row + 1 for row in range(count))
        assert sum(cost.pairs for cost in found) == seen
        assert sum(cost.rows for cost in found) == count * (1 if is_dealt else size)
        assert sum(cost.cache for cost in found) == (first + count) * shape.key_bytes
        results = count * (size - 1) * (1 if is_dealt else size) * shape.result_bytes
        queries = size * (size - 1) * -(-count // size) * shape.query_bytes if is_dealt else 0
        assert sum(cost.sent for cost in found) == sum(cost.received for cost in found) == results + queries


@pytest.mark.parametrize("ranks", (2, 3, 8))
@pytest.mark.parametrize("wire", (Wire.of("cpu", 1), Wire.of("cuda", 1), Wire.of("cuda", 4)))
@pytest.mark.parametrize(
    "shape",
    (
        ModelShape(2, 32, 4, 2, 8, 3 * 32 * 48, 8, (None, None)),
        ModelShape(32, 4096, 32, 8, 128, 3 * 4096 * 14336, 2, (None,) * 32),
    ),
)
def test_the_threshold_is_where_both_ways_take_the_same_time(shape: ModelShape, wire: Wire, ranks: int) -> None:
    """Seconds of both ways, added up from the costs of equal shares."""
    call = CallShape(shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim, shape.bytes_per_value)

    def seconds(count: int, is_dealt: bool) -> float:
        cost = turns.costs(count, [0] * ranks, call, is_dealt=is_dealt)[0]
        exchanges = 2 * shape.layers + 1 if is_dealt else shape.layers
        moved = shape.layers * cost.received / wire.bandwidth
        return shape.linear_flops(cost.rows) / wire.flops + exchanges * wire.latency + moved

    least = least_turn(shape, ranks, wire)
    assert least is not None and least >= ranks
    below, above = least // ranks * ranks, -(-least // ranks) * ranks  # multiples: equal shares
    assert seconds(above, True) <= seconds(above, False) * (1 + 1e-9)
    if below - ranks >= ranks:
        assert seconds(below - ranks, True) > seconds(below - ranks, False)
    assert least_turn(shape, 1, wire) is None


@pytest.fixture(scope="module", params=(pytest.param(2, marks=pytest.mark.grid), 3))
def launch(request):
    with started(request.param) as group:
        yield group


MOVED = ("merge", *turns.EXCHANGES)
STAR = dict(block_size=5, anchor_size=3, query_size=4, anchor="recompute")
TURNS = {
    "star": dict(name="star_attention", options=STAR),
    "tiled": dict(name="tiled_attention"),
    "cqs, windows and softcap": dict(name="cqs_attention", family="gemma2"),
}


@pytest.mark.multi_process
@pytest.mark.parametrize("case", TURNS)
def test_a_second_turn_is_dealt_and_gives_the_same_tokens_at_the_counted_cost(launch, case) -> None:
    """23 tokens and 4 generated ones are cached; the second turn has 1 + 9 tokens in each of 2 rows."""
    size, given = launch.size, TURNS[case]
    shape, layers, decoded = CallShape(4, 2, 8, 8, 8, batch=2), 2, 4
    for is_dealt in (True, False) if case == "star" else (True,):
        limit = 20 if is_dealt else 21
        results = launch.run(cases.turns, **given | {"options": given.get("options", {}) | {"min_turn": limit}})
        assert all(result["tokens"] == results[0]["wanted"] for result in results), "the tokens of one process"
        assert results[0]["error"] <= 1e-10
        counts = f"{int(is_dealt)} dealt, {int(not is_dealt)} computed by every rank"
        assert f"later turns (dealt from {limit} tokens on): {counts}" in results[0]["summary"]
        counted = turns.costs(10, results[0]["before"], shape, is_dealt=is_dealt)
        for rank, result in enumerate(results):
            moved = {what: result["traffic"].get(what, {"sent": 0, "received": 0}) for what in MOVED}
            steps = layers * decoded * (size - 1) * shape.result_bytes
            assert sum(each["sent"] for each in moved.values()) == layers * counted[rank].sent + steps
            assert sum(each["received"] for each in moved.values()) == layers * counted[rank].received + steps
            if is_dealt:
                assert result["computed"] == counted[rank].rows
        assert all(("queries" in result["traffic"]) == is_dealt for result in results)
