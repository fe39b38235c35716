"""Gemma 2 (softcap) and T5 (position bias, dropout) run in the compiled CPU kernels by choice, and agree with eager."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import nn

import hf_attn_plugins as hap
from hf_attn_plugins.kernels.choose import fused_from
from hf_attn_plugins.kernels.cpu_fused import attend as fused
from tests.families import SMALL, VOCAB, padded_batch
from tests.older import needs_registry

pytestmark = pytest.mark.skipif(fused_from(torch.float32, True) is None, reason="no compiled kernels for this CPU")


def gemma2() -> nn.Module:
    config = hf.Gemma2Config(**SMALL, head_dim=16, sliding_window=5, attn_logit_softcapping=4.0)
    return hf.Gemma2ForCausalLM(config)


def t5(dropout: float = 0.0) -> nn.Module:
    config = hf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=16, d_ff=48, num_layers=2, num_heads=4, pad_token_id=0,
                         eos_token_id=2, decoder_start_token_id=0, dropout_rate=dropout)  # fmt: skip
    return hf.T5ForConditionalGeneration(config)


def loss_and_gradients(model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids, mask = padded_batch(side="right")
    model.zero_grad()
    loss = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def calls(monkeypatch) -> dict[str, int]:
    """How often forward and backward of the compiled kernels ran."""
    counts = {"forward": 0, "backward": 0}
    for name in counts:
        run = getattr(fused, name)

        def counted(*args, name=name, run=run):
            counts[name] += 1
            return run(*args)

        monkeypatch.setattr(fused, name, counted)
    return counts


@pytest.mark.parametrize("build, layers", [(gemma2, 2), (t5, 4)], ids=["gemma2", "t5"])
def test_training_runs_in_them(build, layers, calls):
    torch.manual_seed(0)
    model = build()
    needs_registry(model, "tiled_attention")
    model.set_attn_implementation("eager")
    expected_loss, expected = loss_and_gradients(model)
    assert not calls["forward"]
    with hap.use(model, "tiled_attention"):
        loss, got = loss_and_gradients(model)
    assert calls["forward"] >= layers and calls["backward"] >= layers
    torch.testing.assert_close(loss, expected_loss)
    assert set(got) == set(expected)
    scale = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-4 * scale, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}")


def test_t5_trains_with_dropout(calls):
    torch.manual_seed(0)
    model = t5(dropout=0.1).train()
    needs_registry(model, "tiled_attention")
    with hap.use(model, "tiled_attention"):
        first, _ = loss_and_gradients(model)
        second, got = loss_and_gradients(model)
    assert calls["backward"] >= 8 and first != second
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert got[bias].isfinite().all() and got[bias].abs().max() > 0
