"""Tiny random models of several families, and what Star Attention means for them, in plain masks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen3Config,
)

from hf_attn_plugins.star.plan import Plan

VOCABULARY = 97
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
WINDOW = 9
LONG = [1.0 + 0.5 * i for i in range(4)]
CONFIGS = {
    "llama": lambda: LlamaConfig(**SMALL),
    "qwen3": lambda: Qwen3Config(**SMALL, head_dim=8),
    "mistral": lambda: MistralConfig(**SMALL, sliding_window=WINDOW),
    "gemma2": lambda: Gemma2Config(**SMALL, head_dim=8, sliding_window=WINDOW, attn_logit_softcapping=5.0),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2
    ),
    "gpt_oss": lambda: GptOssConfig(
        **SMALL, head_dim=8, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2
    ),
    "llama_dynamic": lambda: LlamaConfig(
        **{**SMALL, "max_position_embeddings": 16},
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    ),
    "phi3_longrope": lambda: Phi3Config(
        **SMALL,
        original_max_position_embeddings=16,
        rope_parameters={
            "rope_type": "longrope",
            "long_factor": LONG,
            "short_factor": [1.0] * 4,
            "rope_theta": 10000.0,
            "original_max_position_embeddings": 16,
        },
    ),
}
FAMILIES = ["llama", "qwen3", "mistral", "gemma2", "gpt2", "gpt_oss"]
EAGER = {"gemma2", "gpt_oss"}
MOVING = ["llama_dynamic", "phi3_longrope"]


def exact(family: str) -> dict[str, float]:
    """Tolerances in float64; eager attention, which softcap and sinks need, takes its softmax in float32."""
    limit = 2e-5 if family in EAGER else 1e-10
    return {"rtol": limit, "atol": limit}


def tiny(family: str, dtype: torch.dtype = torch.float64, implementation: str | None = None) -> PreTrainedModel:
    """A model with sharp attention: weights far larger than at initialisation, so that a wrong mask shows."""
    torch.manual_seed(0)
    implementation = implementation or ("eager" if family in EAGER else "sdpa")
    config = CONFIGS[family]()
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 or "sinks" in name or "bias" in name:
                torch.nn.init.normal_(parameter, std=0.2)
    return model


def tokens(length: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def seen_by_plan(plan: Plan) -> Tensor:
    """(length, length), pair by pair from the planner."""
    return torch.tensor([[plan.may_attend(i, j) for j in range(plan.length)] for i in range(plan.length)])


def as_masks(model: PreTrainedModel, seen: Tensor, distance: Tensor) -> Any:
    """(B, T, S) visibility as what the model takes: float masks, windows cut out for the layers that have one."""
    dtype = next(model.parameters()).dtype

    def mask(visible: Tensor) -> Tensor:
        return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None]

    window = getattr(model.config, "sliding_window", None)
    if window is None:
        return mask(seen)
    kinds = set(getattr(model.config, "layer_types", None) or ["sliding_attention"])
    sliding = mask(seen & (distance < window))
    return {"full_attention": mask(seen), "sliding_attention": sliding} if len(kinds) > 1 else sliding


@torch.no_grad()
def oracle(model: PreTrainedModel, ids: Tensor, plan: Plan) -> Tensor:
    """Logits of one ordinary forward under the plan's mask: the definition."""
    position = torch.arange(plan.length)
    masks = as_masks(model, seen_by_plan(plan)[None], (position[:, None] - position)[None])
    return model(ids, attention_mask=masks, use_cache=False).logits


@torch.no_grad()
def recomputed(model: PreTrainedModel, ids: Tensor, plan: Plan) -> DynamicCache:
    """The paper's phase 1: every later block behind a freshly computed anchor, whose keys are thrown away."""
    cache = DynamicCache()
    for block in plan.blocks():
        places = [*(plan.anchor if block.start else ()), *block]
        position = torch.tensor(places)[None]
        causal = torch.ones(len(places), len(places), dtype=torch.bool).tril()[None]
        masks = as_masks(model, causal, position[:, :, None] - position[:, None, :])
        own = DynamicCache()
        model(ids[:, places], position_ids=position, attention_mask=masks, past_key_values=own, use_cache=True)
        for index, layer in enumerate(own.layers):
            cache.update(layer.keys[:, :, -len(block) :], layer.values[:, :, -len(block) :], index)
    return cache


@contextlib.contextmanager
def rope_held_at(model: PreTrainedModel, length: int) -> Iterator[None]:
    """Rotary embeddings computed for `length` positions at once and sliced, whatever the call."""
    (rotary,) = (m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    probe = torch.zeros(1, 1, dtype=next(model.parameters()).dtype)
    rotary(probe, torch.zeros(1, 1, dtype=torch.long))
    cos, sin = rotary(probe, torch.arange(length)[None])

    def forward(x: Tensor, position_ids: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        return cos[0, position_ids], sin[0, position_ids]

    rotary.forward = forward
    try:
        yield
    finally:
        del rotary.forward
