"""CQS on real processes: exchanges, models and a training loop against dense attention in one process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hf_attn_plugins.commands.bench.parallel.volumes import differences
from hf_attn_plugins.cqs.planning.cost import CallShape
from hf_attn_plugins.parallel.costs import costs
from hf_attn_plugins.parallel.cqs_plan import rank_plan
from tests.parallel import cases, cqs_cases
from tests.parallel.processes import Ranks
from tests.parallel.processes import ranks as started

pytestmark = pytest.mark.multi_process

SHAPE = CallShape(heads=4, kv_heads=2, head_dim=6, head_dim_v=5, itemsize=8, batch=2)


# One launch by default; threads stand for other numbers of ranks in test_cqs_exchange.
@pytest.fixture(scope="module", params=[*(pytest.param(size, marks=pytest.mark.grid) for size in (1, 2, 3)), 4])
def ranks(request: Any) -> Iterator[Ranks]:
    with started(request.param) as group:
        yield group


@pytest.fixture(scope="module")
def seven() -> Iterator[Ranks]:
    with started(7) as group:
        yield group


def check_exchange(ranks: Ranks, tokens: int, workers: int | None, is_causal: bool, rounds: int, padding: int) -> None:
    case = dict(tokens=tokens, workers=workers, is_causal=is_causal, rounds=rounds, padding=padding)
    plan = rank_plan(tokens, ranks.size, workers, None, is_causal, rounds)
    for rank, found in enumerate(ranks.run(cqs_cases.exchange, **case)):
        assert max(found["errors"]) < 1e-10, rank
        for what, volume in (
            ("cqs groups", plan.inputs(rank, SHAPE)),
            ("cqs results", plan.results(rank, SHAPE)),
            ("cqs results (backward)", plan.result_gradients(rank, SHAPE)),
            ("cqs groups (backward)", plan.input_gradients(rank, SHAPE)),
        ):
            if ranks.size > 1:
                assert found["traffic"][what] == {"calls": rounds, **vars(volume)}, (rank, what)


@pytest.mark.parametrize(
    ("workers", "is_causal", "rounds", "padding"),
    [(None, True, 1, 0), (31, True, 1, 11), (31, True, 8, 0), (7, False, 1, 11)],
)
def test_shards_give_dense_attention_and_the_planned_bytes(
    ranks: Ranks, workers: int | None, is_causal: bool, rounds: int, padding: int
) -> None:
    check_exchange(ranks, 43, workers, is_causal, rounds if ranks.size == 4 else 1, padding)


GENERATE = {
    "left padding": {"given": {"length": 23, "batch": 3, "padding": 4}},
    "windows and softcap": {"family": "gemma2", "given": {"length": 23, "batch": 2, "padding": 7}},
    "beams, 13 workers in rounds": {"options": {"workers": 13, "rounds": 3}, "num_beams": 3},
    "fewer tokens than workers": {"options": {"workers": 31}},
    "sampling": {"do_sample": True, "top_k": 20, "num_return_sequences": 2},
}
MORE = {
    "sinks": {"family": "gpt_oss", "dtype": "float32"},  # experts know no float64
    "two kinds of layers": {"family": "gemma3", "given": {"length": 40, "batch": 2, "padding": 9}},
    "windows": {"family": "mistral", "given": {"length": 40, "batch": 1}},
    "learned positions": {"family": "gpt2", "given": {"length": 23, "batch": 3, "padding": 4}},
    "right padding": {"given": {"length": 23, "batch": 3, "padding": 4, "side": "right"}},
    "right padding, learned positions": {
        "family": "gpt2",
        "given": {"length": 23, "batch": 3, "padding": 4, "side": "right"},
    },
    "two tokens": {"given": {"length": 2, "batch": 1}},
    "prefill in chunks": {"prefill_chunk_size": 9},
}


def check_generate(ranks: Ranks, case: dict[str, Any]) -> None:
    found = ranks.run(cases.generate, name="cqs_attention", **case)
    for rank, result in enumerate(found):
        assert result["tokens"] == found[0]["wanted"], rank
        assert result["implementation"] == found[0]["before"]
    limit = (1e-5 if case.get("dtype") == "float32" else 1e-6) * found[0]["scale"]
    assert max(found[0][what] for what in ("error", "prefill error", "from dense")) <= limit
    if ranks.size > 1:
        length = case.get("given", {"length": 23})["length"]
        assert sum(found[0]["loads"]) >= length
        assert max(found[0]["loads"]) < length or length < ranks.size, "no rank holds all keys"


@pytest.mark.parametrize("case", GENERATE)
def test_generation_is_dense(ranks: Ranks, case: str) -> None:
    check_generate(ranks, GENERATE[case])


@pytest.mark.grid
@pytest.mark.parametrize("case", MORE)
def test_generation_is_dense_everywhere(ranks: Ranks, case: str) -> None:
    check_generate(ranks, MORE[case])


BENCH = {
    "star_attention": [
        {"block_size": 16, "query_size": 10, "anchor": "recompute"},
        {"block_size": 40, "anchor": "broadcast"},
        {"block_size": 16, "query_size": 10, "halo_size": 9, "anchor": "broadcast"},
        {"block_size": 8, "query_size": 10, "halo_size": 70, "anchor_size": 30, "anchor": "recompute"},
    ],
    "cqs_attention": [{}, {"workers": 13, "rounds": 3}],
    "tiled_attention": [{}, {"exchange": "gather"}, {"exchange": "heads"}],
}


@pytest.mark.parametrize("name", BENCH)
def test_bytes_cache_pairs_and_rows_are_those_counted_from_the_plan(ranks: Ranks, name: str, tmp_path: Path) -> None:
    """The table's figures, from the groups' counters and the kernels' masks."""
    if ranks.size == 1:
        pytest.skip("nothing to exchange")
    case = {"length": 131, "heads": 4, "kv_heads": 2, "head_dim": 8, "layers": 2, "dtype": "float32", "name": name}
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([{**case, "options": options} for options in BENCH[name]]), encoding="utf-8")
    ranks.run(cqs_cases.bench, path=str(path))
    files = [json.loads((tmp_path / f"rank-{r}.json").read_text(encoding="utf-8")) for r in range(ranks.size)]
    for options, *reports in zip(BENCH[name], *files, strict=True):
        counted = costs(name, 131, ranks.size, CallShape(4, 2, 8, 8, 4), **options)
        assert differences(counted, reports, layers=2) == []
        assert all(report["sent"] and report["received"] for report in reports) or name == "cqs_attention"
        reports[0]["pairs"] += 1
        assert len(differences(counted, reports, layers=2)) == 1


@pytest.mark.slow
def test_seven_ranks(seven: Ranks) -> None:
    for workers, is_causal in ((7, True), (None, False), (31, True)):
        check_exchange(seven, 61, workers, is_causal, 1, 11)
    check_generate(seven, GENERATE["left padding"])
