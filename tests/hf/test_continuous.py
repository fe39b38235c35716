"""Continuous batching by lengths: the tokens of `generate`, shared prefixes, streams, no mask, all undone."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig

import hf_attn_plugins as hap
from hf_attn_plugins.hf import batching_hint
from hf_attn_plugins.hf.compat import registered_attention
from hf_attn_plugins.hf.continuous import NAME, paged_attention
from tests.families import VOCAB, build

cb = pytest.importorskip("transformers.generation.configuration_utils")
if not hasattr(cb, "ContinuousBatchingConfig"):
    pytest.skip("this Transformers has no ContinuousBatchingConfig", allow_module_level=True)

GREEDY = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=VOCAB + 1)
SMALL = {"num_blocks": 64, "page_size": 16, "max_requests_per_batch": 8}  # the default fills the machine's memory


def settings(**changes):
    return cb.ContinuousBatchingConfig(**{**SMALL, "max_batch_tokens": 64, **changes})


def prompts(*lengths, prefix=()):
    generator = torch.Generator().manual_seed(1)
    return [[*prefix, *torch.randint(5, VOCAB, (n,), generator=generator).tolist()] for n in lengths]


def one_by_one(model, given):
    with torch.no_grad():
        return [model.generate(torch.tensor([p]), generation_config=GREEDY)[0, len(p) :].tolist() for p in given]


def batched(model, given, **changes):
    out = model.generate_batch(
        inputs=given, generation_config=GREEDY, continuous_batching_config=settings(**changes), progress_bar=False
    )
    return [out[key].generated_tokens for key in sorted(out, key=lambda key: int(key.rpartition("_")[2]))]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_tokens_equal_generate_on_more_prompts_than_fit_one_batch(family):
    model = build(family)
    given = prompts(3, 40, 17, 9, 70, 25, 1, 12)  # 70 is prefilled in two pieces
    wanted, before = one_by_one(model, given), model.config._attn_implementation
    with hap.continuous_batching(model), hap.trace(model) as seen:
        assert batched(model, given) == wanted
        assert one_by_one(model, given[:1]) == wanted[:1], "ordinary calls work inside the block"
    assert model.config._attn_implementation == before and registered_attention(NAME) is None
    paged = [call for call in seen.calls if "paged" in call.mask]
    assert paged and {call.plugin for call in paged} == {"tiled_attention"} and {c.layer for c in paged} == {0, 1}
    assert max(call.plan["sequences"] for call in paged) > 1


def test_a_shared_prefix_is_computed_once():
    model = build("llama")
    prefix = prompts(48)[0]
    given = prompts(4, 7, 3, prefix=prefix)
    wanted = one_by_one(model, given)
    rows = {}
    for sharing in (True, False):
        with hap.continuous_batching(model), hap.trace(model) as seen:
            assert batched(model, given, allow_block_sharing=sharing, max_batch_tokens=56) == wanted
        rows[sharing] = sum(call.rows for call in seen.calls if call.layer == 0)
    assert rows[True] <= rows[False] - 48


def test_streams_give_their_tokens_one_by_one_and_no_mask_is_allocated():
    model = build("llama")
    given = prompts(20, 6)
    wanted = one_by_one(model, given)
    with (
        hap.continuous_batching(model),
        model.continuous_batching_context_manager(
            generation_config=GREEDY, continuous_batching_config=settings(), warmup=False
        ) as manager,
    ):
        for prompt, tokens in zip(given, wanted, strict=True):
            name = manager.add_request(prompt, streaming=True)
            seen = [list(part.generated_tokens) for part in manager.request_id_iter(name)]
            assert seen[-1] == tokens and len(seen) > 1
        assert manager.batch_processor.inputs_and_outputs.attention_mask is None


def test_intercept_works_there_with_transformers_mask():
    model = build("llama")
    given = prompts(9, 20)
    wanted = one_by_one(model, given)
    with hap.intercept(model):
        assert batched(model, given) == wanted


def test_blocks_nest_and_an_error_puts_everything_back():
    model = build("llama")
    with pytest.raises(RuntimeError, match="mine"), hap.continuous_batching(model):
        with hap.continuous_batching(build("llama", seed=1)):
            pass
        assert registered_attention(NAME) is paged_attention
        raise RuntimeError("mine")
    assert model.config._attn_implementation == "sdpa" and registered_attention(NAME) is None


def test_what_it_does_not_take():
    model = build("llama")
    for name in ("star_attention", "cqs_attention"):
        with (
            pytest.raises(ValueError, match=f"{name} has no plan for many sequences"),
            hap.continuous_batching(model, name),
        ):
            pass
    with pytest.raises(ValueError, match="no model of Transformers"), hap.continuous_batching(torch.nn.Linear(2, 2)):
        pass
    with pytest.raises(NotImplementedError, match="not read before"):
        paged_attention(model, *[torch.zeros(1, 1, 1, 1)] * 3, read_index=[], cu_seq_lens_q=torch.tensor([0, 1]))


@pytest.mark.parametrize("name", ["tiled_attention", "star_attention"])
def test_a_plugin_named_there_is_told_the_way(name):
    model = build("llama")
    model.set_attn_implementation(name)
    with pytest.raises(ValueError, match=r"Use 'paged\|eager'.*hap\.continuous_batching\(model\)"):
        batched(model, prompts(3))
    batching_hint.forget()
    try:
        with pytest.raises(ValueError) as plain:
            batched(model, prompts(3))
        assert "hap" not in str(plain.value)
    finally:
        batching_hint.add_hint()
