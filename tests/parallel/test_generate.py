"""Several ranks against one process: the same tokens, the same logits."""

from __future__ import annotations

import pytest

from tests.parallel import cases
from tests.parallel.processes import ranks as started

pytestmark = pytest.mark.multi_process


@pytest.fixture(scope="module", params=(2, 3, 4))  # one rank: test_session, test_launch
def ranks(request):
    with started(request.param) as group:
        yield group


STAR = dict(block_size=5, anchor_size=3, query_size=4)
PADDED, ONE = dict(length=23, batch=3, padding=4), dict(length=23, batch=1)
CASES = {
    "padded rows": dict(options=STAR, given=PADDED),
    "anchor broadcast, padded": dict(options=STAR | {"anchor": "broadcast"}, given=PADDED),
    "anchor recomputed": dict(options=STAR | {"anchor": "recompute"}),
    "fewer blocks than ranks": dict(options=dict(block_size=16, anchor_size=4, query_size=4)),
    "shards shorter than the query": dict(options=dict(block_size=3, anchor_size=2, query_size=12)),
    "anchor longer than the last shard": dict(options=dict(block_size=9, anchor_size=8, query_size=3)),
    "sliding windows and softcap": dict(family="gemma2", options=STAR, given=PADDED),
    "near tokens, padded": dict(options=STAR | dict(halo_size=3, anchor="broadcast"), given=PADDED),
    "near tokens and dense heads": dict(options=STAR | dict(halo_size=7, dense_heads=[[0], [1]]), given=PADDED),
    "sampling": dict(options=STAR, do_sample=True, top_k=20, num_return_sequences=2),
    "beams": dict(options=STAR, num_beams=3, given=PADDED),
    "chunks, dealt": dict(options=STAR | {"min_turn": 4}, prefill_chunk_size=9, given=PADDED),
    "dense windows in chunks, dealt": dict(
        name="tiled_attention", family="gemma2", options={"min_turn": 4}, prefill_chunk_size=9, given=PADDED
    ),
    "prompt look-up, dealt": dict(
        options=STAR | {"min_turn": 2}, prompt_lookup_num_tokens=4, given=dict(length=23, batch=1)
    ),
    "dense, assisted, sampled": dict(
        name="tiled_attention", assistant=0.03, given=ONE, max_new_tokens=12, do_sample=True, top_k=20
    ),
    "dense, padded rows": dict(name="tiled_attention", given=PADDED),
    "dense, beams": dict(name="tiled_attention", num_beams=3),
}
MORE = {
    "assisted, dealt": dict(options=STAR | {"min_turn": 2}, assistant=0.03, given=ONE, max_new_tokens=12),
    "assisted": dict(options=STAR | {"halo_size": 3}, assistant=0.03, given=ONE, max_new_tokens=12),
    "assisted, sampled": dict(options=STAR, assistant=0.1, given=ONE, max_new_tokens=12, do_sample=True, top_k=20),
    "cqs, assisted": dict(name="cqs_attention", assistant=0.03, given=ONE, max_new_tokens=12),
    "cqs, assisted, windows, dealt": dict(
        name="cqs_attention", family="gemma2", options={"min_turn": 2}, assistant=0.03, given=ONE, max_new_tokens=12
    ),
    "dense, assisted, windows": dict(
        name="tiled_attention", family="gemma2", assistant=0.03, given=ONE, max_new_tokens=12
    ),
    "cqs, prompt look-up": dict(name="cqs_attention", prompt_lookup_num_tokens=3, given=ONE),
    "one block": dict(options=dict(block_size=64)),
    "neither anchor nor query": dict(options=dict(block_size=4, anchor_size=0, query_size=0), given=PADDED),
    "all of it query": dict(options=dict(block_size=5, anchor_size=5, query_size=40), given=PADDED),
    "blocks of one token": dict(options=dict(block_size=1, anchor_size=1, query_size=1)),
    "padding on the right": dict(options=STAR, given=PADDED | {"side": "right"}),
    "default sizes": dict(),
    "two tokens": dict(options=STAR, given=dict(length=2, batch=2)),
    "one token": dict(options=STAR, given=dict(length=1, batch=1)),
    "windows, anchor broadcast": dict(family="mistral", options=STAR | {"anchor": "broadcast"}, given=PADDED),
    "sinks": dict(family="gpt_oss", options=STAR, given=PADDED, dtype="float32"),
    "two kinds of layers": dict(family="gemma3", options=STAR, given=PADDED),
    "qwen3": dict(family="qwen3", options=STAR, given=PADDED),
    "learned positions": dict(family="gpt2", options=STAR, given=PADDED),
    "dense heads, windows": dict(family="gemma2", options=STAR | dict(dense_heads=[[], [0]]), given=PADDED),
    "near tokens, two kinds of layers": dict(family="gemma3", options=STAR | dict(halo_size=6), given=PADDED),
    "prompt look-up": dict(options=STAR, prompt_lookup_num_tokens=3, given=dict(length=23, batch=1)),
    "prefill in chunks": dict(options=STAR, prefill_chunk_size=9, given=PADDED),
    "dense, windows": dict(name="tiled_attention", family="gemma2", given=PADDED),
    "dense, windows in chunks": dict(name="tiled_attention", family="mistral", prefill_chunk_size=9, given=PADDED),
    "dense, short": dict(name="tiled_attention", given=dict(length=3, batch=2)),
    "dense, padding on the right": dict(name="tiled_attention", given=PADDED | {"side": "right"}),
    "dense, sinks": dict(name="tiled_attention", family="gpt_oss", given=PADDED, dtype="float32"),
    "cqs in chunks, dealt": dict(
        name="cqs_attention", options={"min_turn": 4}, prefill_chunk_size=11, given=PADDED | {"side": "right"}
    ),
    "sinks in chunks, dealt": dict(
        family="gpt_oss", options=STAR | {"min_turn": 4}, prefill_chunk_size=9, given=PADDED, dtype="float32"
    ),
    "beams behind chunks, dealt": dict(options=STAR | {"min_turn": 4}, prefill_chunk_size=9, num_beams=3, given=PADDED),
    "dense, prompt look-up": dict(name="tiled_attention", prompt_lookup_num_tokens=3, given=dict(length=23, batch=1)),
}


def check(ranks, case):
    found = ranks.run(cases.generate, **case)
    for rank, result in enumerate(found):
        assert result["tokens"] == found[0]["wanted"], rank
        assert result["implementation"] == found[0]["before"], "the model is as it was"
    limit = 1e-10 if case.get("dtype") is None else 1e-5 * found[0]["scale"]  # experts know no float64
    assert found[0]["error"] <= limit and found[0]["prefill error"] <= limit
    return found


@pytest.mark.parametrize("case", CASES)
def test_same_tokens_and_logits(ranks, case):
    found = check(ranks, CASES[case])
    if CASES[case].get("name", "star_attention") == "star_attention":
        assert found[0]["from dense"] > 1e-3, "star and dense attention must differ for this to be a test"


@pytest.mark.grid
@pytest.mark.parametrize("case", MORE)
def test_same_tokens_and_logits_everywhere(ranks, case):
    check(ranks, MORE[case])


@pytest.mark.parametrize("name", ("star_attention", "tiled_attention"))
def test_a_second_turn_on_the_same_cache(ranks, name):
    found = ranks.run(cases.turns, name=name, options=STAR if name == "star_attention" else {})
    assert all(result["tokens"] == found[0]["wanted"] for result in found) and found[0]["error"] <= 1e-10
    loads = found[0]["loads"]
    assert sum(loads) >= 23 + 5 + 9 + 4 and max(loads) - min(loads) <= 5, "no shard alone grows"


def test_streaming_on_the_first_rank_and_an_early_end(ranks):
    found = ranks.run(cases.streamed)
    plain = found[0]["plain"]
    end = plain.index(plain[25], 23) + 1
    assert all(result["tokens"] == plain[:end] for result in found)
    assert found[0]["heard"] == [*plain[:end], -1] and all(result["heard"] is None for result in found[1:])
