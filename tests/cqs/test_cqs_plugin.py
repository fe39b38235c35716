"""`cqs_attention` inside Transformers: the same results as the default backend, by the plan where there is one."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, models

import hf_attn_plugins as hap
from hf_attn_plugins.cqs import plugin
from hf_attn_plugins.options import CQSOptions

SIZES: dict[str, Any] = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": lambda: models.llama.LlamaConfig(**SIZES),
    "mistral, sliding window": lambda: models.mistral.MistralConfig(**SIZES, sliding_window=17),
    "qwen3": lambda: models.qwen3.Qwen3Config(**SIZES),
    "gemma2, softcap": lambda: models.gemma2.Gemma2Config(**SIZES, sliding_window=17),
    "gemma3": lambda: models.gemma3.Gemma3TextConfig(**SIZES, sliding_window=17),
    "gpt-oss, sinks": lambda: models.gpt_oss.GptOssConfig(
        **SIZES, sliding_window=17, num_local_experts=2, num_experts_per_tok=1
    ),
    "deepseek-v3, other value size": lambda: models.deepseek_v3.DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
        qk_rope_head_dim=8, v_head_dim=6, n_routed_experts=2, num_experts_per_tok=1, n_group=1, topk_group=1,
        moe_intermediate_size=16, n_shared_experts=1,
    ),
}  # fmt: skip
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


def model_of(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(FAMILIES[family](), attn_implementation="eager").eval()


def inputs() -> dict[str, torch.Tensor]:
    """A batch with left padding in its first row."""
    ids = torch.randint(3, 99, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("workers", [7, 8])
@pytest.mark.parametrize("family", FAMILIES)
def test_families_agree_with_eager(family: str, workers: int, divided: list[int]) -> None:
    model, batch = model_of(family), inputs()
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = model(**batch).logits
        with hap.use(model, "cqs_attention", workers=workers, min_length=8):
            found = model(**batch).logits
    assert divided == [workers] * 2
    assert (found - expected)[real].abs().max() < 1e-5


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", ["llama", "mistral, sliding window", "gpt-oss, sinks"])
def test_generation(family: str, cache: str | None, divided: list[int]) -> None:
    model, batch = model_of(family), inputs()
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": 0,
        "cache_implementation": cache,
    }
    expected = model.generate(**batch, **options)
    with hap.use(model, "cqs_attention", workers=7, min_length=8):
        found = model.generate(**batch, **options)
    assert torch.equal(found, expected)
    assert divided == [7, 7]  # the prefill of both layers, and no decoding step


def test_a_second_turn_is_not_divided(divided: list[int]) -> None:
    model, batch = model_of("llama"), inputs()
    ids = batch["input_ids"]
    with torch.no_grad(), hap.use(model, "cqs_attention", workers=7, min_length=8):
        first = model(ids[:, :30], use_cache=True)
        second = model(ids[:, 30:], past_key_values=first.past_key_values)
        together = model(ids).logits
    assert divided == [7, 7] * 2
    assert (second.logits - together[:, 30:]).abs().max() < 1e-5


def test_training(divided: list[int]) -> None:
    model, batch = model_of("llama").train(), inputs()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[0, 11] = -100  # its prediction stands in a padding row

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**batch, labels=labels, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    with hap.use(model, "cqs_attention", workers=7, min_length=8):
        found = gradients()
        model.gradient_checkpointing_enable()
        again = gradients()
    assert divided == [7] * 6 and found.keys() == expected.keys()
    for name, grad in expected.items():
        assert (found[name] - grad).abs().max() < 1e-6 and (again[name] - grad).abs().max() < 1e-6, name


def test_packed_documents(divided: list[int]) -> None:
    model = model_of("llama")
    ids = inputs()["input_ids"][:1]
    positions = torch.cat([torch.arange(20), torch.arange(TOKENS - 20)]).unsqueeze(0)
    with torch.no_grad(), hap.use(model, "cqs_attention", workers=7, min_length=8):
        packed = model(ids, position_ids=positions, use_cache=False).logits
        apart = torch.cat([model(ids[:, :20]).logits, model(ids[:, 20:]).logits], 1)
    assert (packed - apart).abs().max() < 1e-5


def test_the_default_divides_long_prefills_only(divided: list[int]) -> None:
    torch.manual_seed(0)
    config = models.llama.LlamaConfig(**{**SIZES, "max_position_embeddings": 2048, "num_hidden_layers": 1})
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad(), hap.use(model, "cqs_attention"):
        model(torch.ones(1, 1023, dtype=torch.long))
        assert divided == []
        model(torch.ones(1, 1024, dtype=torch.long))
    assert divided == [7]


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
    model, batch = model_of("llama"), inputs()
    with torch.no_grad():
        expected = model(**batch).logits
        hap.configure(model, "cqs_attention", workers=7, interest_set=[0, 1, 5], min_length=8)
        model.set_attn_implementation("cqs_attention")
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="cqs_attention")
        found = again(**batch).logits
    assert divided == [7, 7]
    assert (found - expected)[batch["attention_mask"].bool()].abs().max() < 1e-5


def test_compiled_models_are_exact() -> None:
    model, batch = model_of("llama"), inputs()
    real = batch["attention_mask"].bool()
    with torch.no_grad(), hap.use(model, "cqs_attention", workers=7, min_length=8):
        expected = model(**batch).logits
        torch._dynamo.reset()
        found = torch.compile(model, backend="eager", fullgraph=True)(**batch).logits
    assert (found - expected)[real].abs().max() < 1e-5
