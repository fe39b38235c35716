"""The explicit form under a halo: every layer's keys and values are those of one forward under the plan's mask."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import hf_attn_plugins as hap
from hf_attn_plugins import star
from hf_attn_plugins.star.hf import encoder
from hf_attn_plugins.star.hf.cache import Layers, layers_of
from hf_attn_plugins.star.plan import Plan

from .families import FAMILIES, MOVING, as_masks, exact, oracle, rope_held_at, seen_by_plan, tiny, tokens

# Halos shorter than a block, longer, as long as two, without an anchor, under a longer anchor, and over everything.
SIZES = [(8, 4, 3), (5, 3, 13), (4, 2, 8), (6, 0, 7), (4, 9, 6), (1, 2, 3), (8, 4, 100)]
CONTEXT = 33


@torch.no_grad()
def masked(model: PreTrainedModel, ids: Tensor, plan: Plan) -> Layers:
    """Keys and values of one ordinary forward under the plan's mask: the definition."""
    position, cache = torch.arange(plan.length), DynamicCache()
    masks = as_masks(model, seen_by_plan(plan)[None], (position[:, None] - position)[None])
    model(ids, attention_mask=masks, past_key_values=cache, use_cache=True)
    return layers_of(cache)


def assert_close(one: Layers, other: Layers, **limits: float) -> None:
    for pair, expected in zip(one, other, strict=True):
        torch.testing.assert_close(pair, expected, **limits)


@contextmanager
def forwards(model: PreTrainedModel) -> Iterator[list[tuple[int, Any]]]:
    """(tokens, mask) of every forward of the decoder."""
    seen: list[tuple[int, Any]] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((kwargs["input_ids"].numel(), kwargs["attention_mask"])),
        with_kwargs=True,
    )
    try:
        yield seen
    finally:
        hook.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("block", "anchor", "halo"), SIZES)
@pytest.mark.parametrize("run", [1, 12, 1024])
def test_encoded_equals_masked(
    family: str, block: int, anchor: int, halo: int, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One block a forward, a few, and all at once; two contexts; the question's logits too."""
    monkeypatch.setattr(encoder, "RUN_TOKENS", run)
    model, ids = tiny(family), tokens(37, batch=2)
    plan = Plan(CONTEXT, block, anchor, 0, halo)
    cache = star.encode(model, ids[:, :CONTEXT], block_size=block, anchor_size=anchor, halo_size=halo)
    assert star.plan_of(cache) == plan and cache.get_seq_length() == CONTEXT
    assert_close(layers_of(cache), masked(model, ids[:, :CONTEXT], plan), **exact(family))
    expected = oracle(model, ids, Plan(37, block, anchor, 4, halo))[:, CONTEXT:]
    with torch.no_grad():
        got = model(ids[:, CONTEXT:], past_key_values=cache, use_cache=True).logits
    torch.testing.assert_close(got, expected, **exact(family))


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_encoded_equals_the_stateless_form(family: str, sizes: tuple[int, int, int], dtype: torch.dtype) -> None:
    names = ("block_size", "anchor_size", "halo_size")
    given = dict(zip(names, sizes, strict=True))
    model, ids, cache = tiny(family, dtype, "star_attention"), tokens(CONTEXT, batch=2), DynamicCache()
    hap.configure(model, "star_attention", query_size=0, **given)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    limit = 1e-10 if dtype == torch.float64 else 1e-4
    assert_close(layers_of(star.encode(model, ids, **given)), layers_of(cache), rtol=limit, atol=limit)


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "tiled_attention", "star_attention", "cqs_attention"])
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_every_implementation(family: str, implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "RUN_TOKENS", 12)
    model, ids = tiny(family, torch.float32, implementation), tokens(CONTEXT)
    cache = star.encode(model, ids, block_size=4, anchor_size=2, halo_size=6)
    expected = masked(tiny(family, torch.float32), ids, Plan(CONTEXT, 4, 2, 0, 6))
    assert_close(layers_of(cache), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", MOVING)
def test_rotary_frequencies_are_held(family: str) -> None:
    model, fresh, ids = tiny(family), tiny(family), tokens(CONTEXT)
    cache = star.encode(model, ids, block_size=4, anchor_size=2, halo_size=6, max_length=60)
    with rope_held_at(fresh, 60):
        assert_close(layers_of(cache), masked(fresh, ids, Plan(CONTEXT, 4, 2, 0, 6)), **exact(family))


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("run", [1, 12, 1024])
@pytest.mark.parametrize("pieces", [(3, 10, 20), (8, 8, 17), (13, 1, 19), (32, 1), (33, 0)])
def test_appended_in_pieces(family: str, run: int, pieces: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that end within a block; no token is computed twice."""
    monkeypatch.setattr(encoder, "RUN_TOKENS", run)
    model, ids = tiny(family), tokens(CONTEXT)
    with forwards(model) as seen:
        cache = star.encode(model, ids[:, : pieces[0]], block_size=4, anchor_size=3, halo_size=6)
        for end in torch.tensor(pieces).cumsum(0).tolist()[1:]:
            cache = star.append(model, cache, ids[:, cache.get_seq_length() : end])
    assert sum(rows for rows, _ in seen) == CONTEXT
    assert star.plan_of(cache) == Plan(CONTEXT, 4, 3, 0, 6)
    assert_close(layers_of(cache), masked(model, ids, Plan(CONTEXT, 4, 3, 0, 6)), **exact(family))


def test_small_blocks_need_no_more_forwards_than_large_ones() -> None:
    model, ids = tiny("llama", torch.float32), tokens(4200)
    counts = []
    for sizes in ({"block_size": 1024, "halo_size": 0}, {"block_size": 64, "halo_size": 448}):
        with forwards(model) as seen:
            star.encode(model, ids, anchor_size=64, **sizes)
        counts.append([rows for rows, _ in seen])
    assert counts[0] == counts[1] == [1024] * 4 + [104]


def test_batch_blocks_lengthens_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "RUN_TOKENS", 8)
    model, ids = tiny("llama"), tokens(CONTEXT)
    for batch_blocks, expected in ((1, [8, 8, 8, 8, 1]), (3, [12, 12, 9]), (100, [33])):
        with forwards(model) as seen:
            star.encode(model, ids, block_size=4, anchor_size=2, halo_size=6, batch_blocks=batch_blocks)
        assert [rows for rows, _ in seen] == expected


@pytest.mark.parametrize("most", [1, 100, 200, 400])
def test_masks_stay_small(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """No mask has more pairs than allowed, and a forward that needs none is not cut short."""
    monkeypatch.setattr(encoder, "MOST_PAIRS", most)
    model, ids, plan = tiny("llama"), tokens(CONTEXT, batch=2), Plan(CONTEXT, 4, 2, 0, 6)
    with forwards(model) as seen:
        cache = star.encode(model, ids, block_size=4, anchor_size=2, halo_size=6)
    masks = [mask for _, mask in seen if mask is not None]
    assert all(mask.numel() <= most for mask in masks) and bool(masks) == (most >= 200)
    assert most > 1 or [rows for rows, _ in seen] == [2 * 12, *[2 * 4] * 5, 2]
    assert_close(layers_of(cache), masked(model, ids, plan), **exact("llama"))


def test_implementations_without_mask_tensors_take_a_block_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "takes_mask_tensors", lambda model: False)
    model, ids = tiny("llama"), tokens(CONTEXT)
    with forwards(model) as seen:
        cache = star.encode(model, ids, block_size=4, anchor_size=2, halo_size=6, batch_blocks=4)
    assert seen == [(12, None), *[(4, None)] * 5, (1, None)]
    assert_close(layers_of(cache), masked(model, ids, Plan(CONTEXT, 4, 2, 0, 6)), **exact("llama"))


def test_an_anchor_longer_than_block_and_halo_is_refused() -> None:
    with pytest.raises(ValueError, match="anchor_size=12 is larger than block_size=8 and halo_size=3"):
        star.encode(tiny("llama"), tokens(20), block_size=8, anchor_size=12, halo_size=3)
