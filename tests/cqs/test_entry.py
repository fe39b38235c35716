"""When `cqs_attention` divides and when not; tests/test_interface.py compares it with the default backends."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, models

import hf_attn_plugins as hap
from hf_attn_plugins.cqs import entry as plugin
from hf_attn_plugins.cqs.options import CQSOptions
from tests.families import build, padded_batch

CLOSE = 1e-3  # logits of a few units, made sharp on purpose, in float32
TOKENS = 53


@pytest.fixture
def divided(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of workers of every call that was divided."""
    calls: list[int] = []
    by_plan = plugin.by_plan

    def noted(query: Any, key: Any, value: Any, division: Any, **rest: Any) -> Any:
        calls.append(division.num_workers)
        return by_plan(query, key, value, division, **rest)

    monkeypatch.setattr(plugin, "by_plan", noted)
    return calls


@pytest.mark.parametrize("workers", [7, 8])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt_oss", "qwen3", "gpt2"])
def test_prefills_are_divided_and_agree(family: str, workers: int, divided: list[int]) -> None:
    model, (ids, mask) = build(family), padded_batch(TOKENS)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        with hap.use(model, "cqs_attention", workers=workers, min_length=8):
            found = model(ids, attention_mask=mask).logits
    assert divided == [workers] * 2
    assert (found - expected)[mask.bool()].abs().max() < CLOSE


def test_values_of_another_size_than_keys(divided: list[int]) -> None:
    torch.manual_seed(0)
    config = models.deepseek_v3.DeepseekV3Config(
        vocab_size=97, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=6,
        n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1, moe_intermediate_size=16,
        n_shared_experts=1, pad_token_id=0,
    )  # fmt: skip
    model, (ids, mask) = AutoModelForCausalLM.from_config(config).eval(), padded_batch(TOKENS)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        with hap.use(model, "cqs_attention", workers=7, min_length=8):
            found = model(ids, attention_mask=mask).logits
    assert divided == [7] and (found - expected)[mask.bool()].abs().max() < CLOSE


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss"])
def test_decoding_is_not_divided(family: str, cache: str | None, divided: list[int]) -> None:
    model, (ids, mask) = build(family), padded_batch(TOKENS)
    with hap.use(model, "cqs_attention", workers=7, min_length=1):
        model.generate(ids, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, cache_implementation=cache)
    assert divided == [7, 7]  # the prefill of both layers


def test_a_second_turn_is_not_divided(divided: list[int]) -> None:
    model, (ids, _) = build("llama"), padded_batch(TOKENS, batch=1)
    with torch.no_grad(), hap.use(model, "cqs_attention", workers=7, min_length=8):
        first = model(ids[:, :30], use_cache=True)
        second = model(ids[:, 30:], past_key_values=first.past_key_values)
        assert divided == [7, 7]
        together = model(ids).logits
    assert (second.logits - together[:, 30:]).abs().max() < CLOSE


def test_training_is_divided(divided: list[int]) -> None:
    model, (ids, mask) = build("llama").train(), padded_batch(TOKENS)
    with hap.use(model, "cqs_attention", workers=7, min_length=8):
        model(ids, attention_mask=mask, labels=ids).loss.backward()
    assert divided == [7, 7]


def test_the_default_divides_long_prefills_only(divided: list[int]) -> None:
    model = build("llama")
    with torch.no_grad(), hap.use(model, "cqs_attention"):
        model(torch.ones(1, 1023, dtype=torch.long))
        assert divided == []
        model(torch.ones(1, 1024, dtype=torch.long))
    assert divided == [7, 7]


def test_options() -> None:
    assert CQSOptions(workers=7, interest_set=[0, 1, 5]) == CQSOptions(workers=7, interest_set=(0, 1, 5))  # type: ignore[arg-type]
    for wrong, words in (
        ({"workers": 0}, "workers=0"),
        ({"workers": 7, "interest_set": (0, 1, 2)}, "no difference cover"),
        ({"interest_set": (0, 1)}, "needs workers"),
        ({"min_length": 0}, "min_length=0"),
        ({"kernel": "fast"}, "unknown"),
    ):
        with pytest.raises(ValueError, match=words):
            CQSOptions(**wrong)  # type: ignore[arg-type]


def test_a_users_interest_set_is_used_and_saved(tmp_path: Any, divided: list[int]) -> None:
    model, (ids, mask) = build("llama"), padded_batch(TOKENS)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        hap.configure(model, "cqs_attention", workers=7, interest_set=[0, 1, 5], min_length=8)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="cqs_attention")
        found = again(ids, attention_mask=mask).logits
    assert divided == [7, 7]
    assert (found - expected)[mask.bool()].abs().max() < CLOSE


def test_compiled_graphs_are_divided_as_eager_calls_are(divided: list[int]) -> None:
    model, (ids, mask) = build("llama"), padded_batch(TOKENS)
    torch._dynamo.reset()
    with torch.no_grad(), hap.use(model, "cqs_attention", workers=7, min_length=8):
        model(ids, attention_mask=mask, use_cache=False)
        eager = divided[:]
        torch.compile(model, backend="eager", fullgraph=True)(ids, attention_mask=mask, use_cache=False)
    assert eager and divided == 2 * eager
