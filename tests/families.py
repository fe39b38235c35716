"""Tiny random models of many families, weights scaled to make softmax sharp: the table every plugin is crossed with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCAB = 97
SMALL: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCAB,
    max_position_embeddings=4096,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def llama(**changes: Any) -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**{**SMALL, **changes}))


def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**SMALL, head_dim=8))


def mistral() -> nn.Module:
    return hf.MistralForCausalLM(hf.MistralConfig(**SMALL, sliding_window=5))


def gemma2() -> nn.Module:
    config = hf.Gemma2Config(**SMALL, head_dim=8, sliding_window=5, attn_logit_softcapping=4.0, query_pre_attn_scalar=8)
    return hf.Gemma2ForCausalLM(config)


def gemma3() -> nn.Module:
    kinds = ["sliding_attention", "full_attention"]
    config = hf.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=5, layer_types=kinds, query_pre_attn_scalar=8)
    return hf.Gemma3ForCausalLM(config)


def gpt_oss() -> nn.Module:
    kinds = ["sliding_attention", "full_attention"]
    config = hf.GptOssConfig(
        **SMALL, head_dim=8, sliding_window=5, layer_types=kinds, num_local_experts=2, num_experts_per_tok=1
    )
    model = hf.GptOssForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.normal_(2.0)  # a sink nobody sees would hide that it was dropped
    return model


def gpt2() -> nn.Module:
    config = hf.GPT2Config(
        vocab_size=VOCAB,
        n_positions=512,
        n_embd=32,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    return hf.GPT2LMHeadModel(config)


def bamba() -> nn.Module:
    config = hf.BambaConfig(
        **{**SMALL, "num_hidden_layers": 3},
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
        mamba_expand=2,
        mamba_chunk_size=8,
    )
    return hf.BambaForCausalLM(config)


def bert() -> nn.Module:
    changed = {**SMALL, "max_position_embeddings": 128}
    changed.pop("num_key_value_heads")
    return hf.BertModel(hf.BertConfig(**changed), add_pooling_layer=False)


def modernbert() -> nn.Module:
    config = hf.ModernBertConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        local_attention=6,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        cls_token_id=3,
        sep_token_id=4,
        max_position_embeddings=128,
    )
    return hf.ModernBertModel(config)


def t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCAB,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_heads=4,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    )
    return hf.T5ForConditionalGeneration(config)


def whisper() -> nn.Module:
    config = hf.WhisperConfig(
        vocab_size=VOCAB,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=30,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    return hf.WhisperForConditionalGeneration(config)


def vit() -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=4
    )
    return hf.ViTModel(config, add_pooling_layer=False)


# Decoders that generate text from ids; `default` is the backend Transformers would pick for them.
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "qwen3": qwen3,
    "mistral": mistral,
    "gemma2": gemma2,
    "gemma3": gemma3,
    "gpt_oss": gpt_oss,
    "gpt2": gpt2,
    "bamba": bamba,
}
ENCODERS: dict[str, Callable[[], nn.Module]] = {"bert": bert, "modernbert": modernbert}
OTHERS: dict[str, Callable[[], nn.Module]] = {"t5": t5, "whisper": whisper, "vit": vit}
DEFAULT = {"gemma2": "eager", "gpt_oss": "eager"}  # softcap and sinks: sdpa does not support them


SHARPENED = ("q_proj", "k_proj", "query", "key", "Wqkv", "c_attn", "SelfAttention.q", "EncDecAttention.q")


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """The tiny model `name` in evaluation mode with its default backend and sharp attention."""
    torch.manual_seed(seed)
    model = {**DECODERS, **ENCODERS, **OTHERS}[name]()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if any(
                part in key
                for part in (
                    "q_proj",
                    "k_proj",
                    "query",
                    "key",
                    "Wqkv",
                    "c_attn",
                    "SelfAttention.q",
                    "EncDecAttention.q",
                )
            ):
                parameter.mul_(20.0)
            if "q_norm" in key or "q_layernorm" in key:
                parameter.add_(3.0)  # normalised queries forget the scale of their projection
    model = model.to(dtype).eval()
    model.set_attn_implementation(DEFAULT.get(name, "sdpa"))
    return model


def padded_batch(
    length: int = 13, batch: int = 3, side: str = "left", seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask) with a full row and rows padded on one side."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        hidden = slice(0, 3 * row) if side == "left" else slice(length - 3 * row, length)
        ids[row, hidden], mask[row, hidden] = 0, 0
    return ids, mask
