"""The explicit form with dense heads: every key and value is that of one forward under a mask of its own per head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

import hf_attn_plugins as hap
from hf_attn_plugins import star
from hf_attn_plugins.star.context_rows import in_context, later_rectangles
from hf_attn_plugins.star.hf import encoder
from hf_attn_plugins.star.hf.cache import Layers, layers_of
from hf_attn_plugins.star.plan import Plan

from .families import as_masks, exact, seen_by_plan, tiny, tokens
from .test_encode_halo import assert_close

CONTEXT = 33
SIZES = [(8, 4, 0), (5, 2, 0), (4, 2, 6), (5, 3, 13), (6, 0, 7)]


def by_head(model: PreTrainedModel, plan: Plan, heads: list[int]) -> Any:
    """The plan's mask for every query head, and the causal one for those of dense key heads."""
    position = torch.arange(plan.length)
    distance = (position[:, None] - position)[None]
    sparse, dense = as_masks(model, seen_by_plan(plan)[None], distance), as_masks(model, distance >= 0, distance)
    config = model.config
    key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    group = config.num_attention_heads // key_heads

    def joined(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.cat([other if head // group in heads else one for head in range(group * key_heads)], 1)

    if isinstance(sparse, dict):
        return {kind: joined(sparse[kind], dense[kind]) for kind in sparse}
    return joined(sparse, dense)


@torch.no_grad()
def masked(model: PreTrainedModel, ids: torch.Tensor, plan: Plan, heads: list[int]) -> Layers:
    cache = DynamicCache()
    model(ids, attention_mask=by_head(model, plan, heads), past_key_values=cache, use_cache=True)
    return layers_of(cache)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("run", [1, 12, 1024])
def test_encoded_equals_masked(
    family: str, sizes: tuple[int, int, int], run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoder, "RUN_TOKENS", run)
    block, anchor, halo = sizes
    model, ids = tiny(family), tokens(CONTEXT, batch=2)
    heads = [[1]] * model.config.num_hidden_layers
    cache = star.encode(model, ids, block_size=block, anchor_size=anchor, halo_size=halo, dense_heads=heads)
    assert_close(layers_of(cache), masked(model, ids, Plan(CONTEXT, block, anchor, 0, halo), [1]), **exact(family))
    assert model.config._attn_implementation != "star_attention" and not hasattr(model.config, "hf_attn_plugins")


@pytest.mark.parametrize("implementation", ["sdpa", "star_attention"])
def test_layers_of_their_own_from_the_config_equal_the_stateless_form(implementation: str) -> None:
    sizes = {"block_size": 4, "anchor_size": 2, "halo_size": 6}
    model, ids, cache = tiny("llama", torch.float64, "star_attention"), tokens(CONTEXT, batch=2), DynamicCache()
    hap.configure(model, "star_attention", query_size=0, dense_heads=[[1], [0]], **sizes)
    with torch.no_grad():
        model(ids, past_key_values=cache, use_cache=True)
    model.set_attn_implementation(implementation)
    encoded = star.encode(model, ids, **sizes)
    assert_close(layers_of(encoded), layers_of(cache), rtol=1e-10, atol=1e-10)
    without = star.encode(model, ids, dense_heads=[], **sizes)
    assert not torch.allclose(layers_of(without)[1][0], layers_of(cache)[1][0], atol=1e-6)


@pytest.mark.parametrize("pieces", [(3, 10, 20), (13, 1, 19), (32, 1)])
def test_appended_in_pieces(pieces: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The heads are those of the cache, whatever the config says meanwhile."""
    monkeypatch.setattr(encoder, "RUN_TOKENS", 12)
    model, ids = tiny("llama"), tokens(CONTEXT)
    cache = star.encode(model, ids[:, : pieces[0]], block_size=4, anchor_size=3, halo_size=6, dense_heads=[[0]] * 2)
    hap.configure(model, "star_attention", dense_heads=[[0, 1]])
    for end in torch.tensor(pieces).cumsum(0).tolist()[1:]:
        cache = star.append(model, cache, ids[:, cache.get_seq_length() : end])
    assert_close(layers_of(cache), masked(model, ids, Plan(CONTEXT, 4, 3, 0, 6), [0]), **exact("llama"))


def test_saved_resumed_and_asked(tmp_path: Path) -> None:
    model, ids = tiny("llama"), tokens(CONTEXT)
    given: dict[str, Any] = {"block_size": 4, "anchor_size": 3, "halo_size": 6, "dense_heads": [[1], []]}
    cache = star.encode(model, ids, resume=tmp_path / "context", **given)
    assert json.loads((tmp_path / "context" / "star.json").read_text())["dense_heads"] == [[1], []]
    again = star.load(tmp_path / "context", model)
    assert again.star.dense_heads == ((1,), ())
    question = tokens(5, seed=1)[0]
    answers = [star.ask(model, each, [question], max_new_tokens=4, do_sample=False)[0] for each in (cache, again)]
    assert torch.equal(*answers)
    with pytest.raises(ValueError, match=r"holds an encoding with dense_heads=\[\[1\], \[\]\], asked for None"):
        star.encode(model, ids, resume=tmp_path / "context", **{**given, "dense_heads": []})
    path = tmp_path / "context" / "star.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dense_heads": [[-1]]}))
    with pytest.raises(ValueError, match=r"star\.json is damaged, dense_heads\[0\]=\[-1\]"):
        star.load(tmp_path / "context", model)


def test_a_head_that_is_not_there_is_refused() -> None:
    model = tiny("llama")
    with pytest.raises(ValueError, match="dense_heads names key head 7"):
        star.encode(model, tokens(CONTEXT), block_size=4, anchor_size=2, dense_heads=[[7]])
    assert not hasattr(model.config, "hf_attn_plugins") and model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("start", [1, 4, 7, 20, 32])
def test_later_rectangles_hold_the_pairs_of_the_later_rows(start: int) -> None:
    plan = Plan(CONTEXT, 4, 3, 0, 6)
    pairs = [
        (row + start, key)
        for each in later_rectangles(plan, start)
        for row in range(each.row_begin, each.row_end)
        for key in range(each.key_begin, each.key_end)
        if key <= row + start
    ]
    expected = {(i, j) for i in range(start, CONTEXT) for j in range(CONTEXT) if plan.may_attend(i, j)}
    assert len(pairs) == len(set(pairs)) and set(pairs) == expected


def test_trace_counts_the_pairs_of_later_rows() -> None:
    model, ids, cache = tiny("llama", implementation="star_attention"), tokens(CONTEXT), DynamicCache()
    hap.configure(model, "star_attention", block_size=4, anchor_size=3, halo_size=6, query_size=0)
    plan, first = Plan(CONTEXT, 4, 3, 0, 6), Plan(20, 4, 3, 0, 6)
    with torch.no_grad(), in_context():
        model(ids[:, :20], past_key_values=cache, use_cache=True)
        with hap.trace(model) as seen:
            model(ids[:, 20:], past_key_values=cache, use_cache=True)
    causal = plan.causal_pairs() - first.causal_pairs()
    assert seen.methods == {"star": model.config.num_hidden_layers}
    assert seen.share == pytest.approx((plan.attended_pairs() - first.attended_pairs()) / causal)
    with torch.no_grad(), hap.trace(model) as seen:
        model(tokens(3), past_key_values=cache, use_cache=True)
    assert set(seen.methods) == {"dense"}
