"""The Tiler: any order, each worker once, nobody missing."""

import random

import pytest
import torch

from hf_attn_plugins import cqs
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.cqs.tokens import Tokens
from hf_attn_plugins.cqs.workers import WorkerResult
from hf_attn_plugins.testing import dense_attention, sharp_inputs

TOKENS = 40


@pytest.fixture(params=[7, (3, 4)], ids=str)
def parts(request: pytest.FixtureRequest) -> tuple[list, list[WorkerResult], list[torch.Tensor]]:
    inputs = list(sharp_inputs(1, 2, 1, TOKENS, TOKENS, 4, dtype=torch.float64))
    leaves = list(cqs.plan(TOKENS, request.param).leaves())
    results = [cqs.work(leaf, *map(Tokens, inputs), mask=Mask(causal=True)) for leaf in leaves]
    return leaves, results, inputs


def expected(inputs: list[torch.Tensor]) -> torch.Tensor:
    return dense_attention(*inputs, torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril())[0]


def test_order_does_not_matter(parts: tuple) -> None:
    leaves, results, inputs = parts
    found = []
    for seed in range(3):
        shuffled = random.Random(seed).sample(results, len(results))
        tiler = cqs.Tiler(leaves, inputs[0], 4)
        assert all(tiler.add(result) for result in shuffled)
        found.append(tiler.result())
    assert (found[0].out - expected(inputs)).abs().max() < 1e-10
    assert all(torch.equal(a.out, found[0].out) and torch.equal(a.lse, found[0].lse) for a in found)


def test_a_repeated_result_is_not_counted_twice(parts: tuple) -> None:
    leaves, results, inputs = parts
    tiler = cqs.Tiler(leaves, inputs[0], 4)
    for result in results:
        assert tiler.add(result)
    garbled = Partial(torch.full_like(results[2].partials[0].out, 1e6), results[2].partials[0].lse + 50)
    assert not tiler.add(results[2]._replace(partials=(garbled, *results[2].partials[1:])))
    assert (tiler.result().out - expected(inputs)).abs().max() < 1e-10


def test_missing_workers_are_named(parts: tuple) -> None:
    leaves, results, inputs = parts
    tiler = cqs.Tiler(leaves, inputs[0], 4)
    for result in results[:2] + results[3:]:
        tiler.add(result)
    assert tiler.missing == [leaves[2].name]
    with pytest.raises(ValueError, match=f"no result from {leaves[2].name}:"):
        tiler.result()
    tiler.add(results[2])
    assert tiler.missing == [] and (tiler.result().out - expected(inputs)).abs().max() < 1e-10


def test_many_missing_workers_are_counted() -> None:
    tiler = cqs.Tiler(cqs.plan(40, 13).leaves(), torch.zeros(1, 1, 40, 2), 2)
    with pytest.raises(ValueError, match=r"worker 0, worker 1, .* and 5 more"):
        tiler.result()


def test_a_stranger_is_refused(parts: tuple) -> None:
    leaves, results, inputs = parts
    with pytest.raises(ValueError, match=r"worker 99\.1 came in"):
        cqs.Tiler(leaves, inputs[0], 4).add(results[0]._replace(path=(99, 1)))


def test_rows_that_no_result_covers_see_nothing() -> None:
    leaves = list(cqs.plan(4, 1).leaves())
    tiler = cqs.Tiler(leaves, torch.zeros(1, 1, 4, 2), 3)
    tiler.add(WorkerResult((0,), ((0, 2),), (Partial(torch.ones(1, 1, 2, 3), torch.zeros(1, 1, 2)),)))
    out, lse = tiler.result()
    assert out[0, 0, :, 0].tolist() == [1, 1, 0, 0] and lse[0, 0].tolist() == [0, 0, -torch.inf, -torch.inf]
