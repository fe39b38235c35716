"""Exchanges arrive as they were sent, and bytes, caches and work are what the formulas say."""

from __future__ import annotations

import pytest

from hf_attn_plugins.parallel.link import Wire, cheaper_anchor
from hf_attn_plugins.star.cost import ModelShape
from tests.parallel import measuring
from tests.parallel.processes import ranks as started

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 2, 4, 2, 8


def merge_bytes(heads, head_dim, out_bytes=2, lse_bytes=4):
    """Bytes of (out, lse) of one token in one layer: the formula that counted bytes are compared with."""
    return heads * (head_dim * out_bytes + lse_bytes)


def keys_bytes(kv_heads, head_dim, number_bytes=2):
    """Bytes of keys and values of one token in one layer."""
    return 2 * kv_heads * head_dim * number_bytes


@pytest.fixture(scope="module", params=(1, 3))
def ranks(request):
    with started(request.param) as group:
        yield group


@pytest.mark.multi_process
def test_every_exchange_forward_and_backward(ranks):
    size = ranks.size
    for rank, found in enumerate(ranks.run(measuring.exchanges)):
        ok = ("all_gather", "all_gather backward", "all_to_all", "partials", "collect", "left")
        assert all(found[name] for name in ok), found
        assert found["broadcast"] == [0] * size if size == 1 else found["broadcast"] == list(range(size))
        assert found["objects"] == [{"rank": other, "text": "x" * other} for other in range(size)]
        assert found["bytes"] == sum((rank + other) * 3 * 4 for other in range(size) if other != rank)
        assert found["merge bytes"] == (size - 1) * 3 * merge_bytes(2, 5)


@pytest.mark.multi_process
@pytest.mark.parametrize(("dtype", "number", "lse"), (("float64", 8, 8), ("bfloat16", 2, 4)))
@pytest.mark.parametrize("anchor", ("recompute", "broadcast"))
def test_star_sends_and_holds_what_the_formulas_say(ranks, dtype, number, lse, anchor):
    length, new, query, block, a = 40, 9, 4, 6, 5  # 36 tokens of context in 6 blocks
    options = dict(block_size=block, anchor_size=a, query_size=query, anchor=anchor)
    found = ranks.run(measuring.measured, name="star_attention", options=options, length=length, new=new, dtype=dtype)
    size = ranks.size
    if size == 1:
        assert found[0]["traffic"] == {}, "one process talks to nobody"
        return
    per_token = merge_bytes(HEADS, HEAD_DIM, number, lse)
    assert per_token == HEADS * HEAD_DIM * number + HEADS * lse
    rows = query + new - 1  # the last token is made and not read
    for rank, result in enumerate(found):
        assert result["made"] == new
        assert result["traffic"]["merge"]["sent"] == (size - 1) * LAYERS * rows * per_token
        assert result["traffic"]["merge"]["received"] == result["traffic"]["merge"]["sent"]
        assert result["traffic"]["merge"]["calls"] == LAYERS * new, "one message per layer and step"
        assert f"{per_token} bytes per token and layer" in result["summary"]
        told = result["traffic"].get("anchor", {"sent": 0, "received": 0})
        whole = LAYERS * a * keys_bytes(KV_HEADS, HEAD_DIM, number) if anchor == "broadcast" else 0
        assert told["sent"] == (whole * (size - 1) if rank == 0 else 0)
        assert told["received"] == (whole if rank else 0)
        again = a if rank and anchor == "recompute" else 0
        assert result["prefill"] == 36 // size + query + again
        held = length + new - 1
        assert sum(result["loads"]) == held and max(result["loads"]) - min(result["loads"]) <= 1
        assert result["cache"] == result["loads"][rank] * LAYERS * keys_bytes(KV_HEADS, HEAD_DIM, number)


@pytest.mark.multi_process
def test_dense_gathers_keys_and_deals_them_evenly(ranks):
    length, new = 36, 5
    found = ranks.run(measuring.measured, name="tiled_attention", options={}, length=length, new=new, dtype="float64")
    size = ranks.size
    for rank, result in enumerate(found if size > 1 else ()):
        each = keys_bytes(KV_HEADS, HEAD_DIM, 8)
        assert result["traffic"]["keys and values"]["sent"] == (size - 1) * LAYERS * (length // size) * each
        assert result["traffic"]["merge"]["sent"] == (size - 1) * LAYERS * (new - 1) * merge_bytes(
            HEADS, HEAD_DIM, 8, 8
        )
        assert result["prefill"] == length // size
        assert max(result["loads"]) - min(result["loads"]) <= 1 and sum(result["loads"]) == length + new - 1
        assert result["cache"] == result["loads"][rank] * LAYERS * each


def test_formulas_of_a_real_model():
    assert merge_bytes(32, 128) == 8320, "Llama-3.1-8B in bfloat16, as in the original's exchange"
    assert keys_bytes(8, 128) == 4096


def test_the_anchor_is_recomputed_where_the_wire_is_the_slower_way():
    llama = ModelShape(32, 4096, 32, 8, 128, 3 * 4096 * 14336, 2, (None,) * 32)
    fast, slow = Wire.of("cuda", 1), Wire(flops=2e14, bandwidth=1e8, latency=1e-3)
    assert cheaper_anchor(llama, 4096, 4, fast) == "broadcast"
    assert cheaper_anchor(llama, 4096, 4, slow) == "recompute"
    assert cheaper_anchor(llama, 1, 4, slow) == "recompute", "a latency in every layer for a token"
    tiny = ModelShape(2, 32, 4, 2, 8, 3 * 32 * 48, 4, (None, None))
    assert cheaper_anchor(tiny, 8, 2, Wire.of("cpu", 1)) == "recompute"
