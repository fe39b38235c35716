"""`intercept`: one model's SDPA calls go to our kernels, nobody else's do, and all of it can be undone."""

from __future__ import annotations

import copy
import dataclasses
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hf_attn_plugins.hf import intercept as module
from hf_attn_plugins.hf.intercept import intercept, scaled_dot_product_attention
from hf_attn_plugins.plugins import PLUGINS
from hf_attn_plugins.testing import assert_close_to_reference


class Attention(nn.Module):
    """Self-attention as remote code writes it: straight to PyTorch's function."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.qkv = nn.Linear(16, 48)

    def forward(self, x, mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4) * 3
        out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal and mask is None)
        return out.transpose(1, 2).flatten(2)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Attention(), nn.Tanh(), Attention()).eval()


X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def counted(monkeypatch):
    """The calls that reached our kernels."""
    calls, inner = [], module.attend
    monkeypatch.setattr(module, "attend", lambda *a, **k: calls.append(1) or inner(*a, **k))
    return calls


def test_calls_are_routed_and_equal(counted):
    model = build()
    wanted = model(X)
    with intercept(model, "tiled_attention", sample=X) as interception:
        assert interception.calls == 2
        counted.clear()
        torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)
        assert len(counted) == 2
    counted.clear()
    assert torch.equal(model(X), wanted) and not counted
    assert not model._forward_hooks and not model._forward_pre_hooks


def test_for_good_and_undone(counted):
    model = build()
    interception = intercept(model, sample=X)
    counted.clear()
    for _ in range(2):
        model(X)
    assert len(counted) == 4
    interception.undo()
    interception.undo()
    model(X)
    assert len(counted) == 4


def test_other_models_and_threads_are_untouched(counted):
    model, other = build(), build()
    intercept(model, sample=X)
    counted.clear()
    seen = []

    def watch(*_):
        thread = threading.Thread(target=lambda: seen.append(other(X)))
        thread.start()
        thread.join()

    model[1].register_forward_hook(watch)
    model(X)
    other(X)
    model[0](X)
    F.scaled_dot_product_attention(X, X, X)
    assert len(counted) == 2 and len(seen) == 1


def test_a_model_within_a_model_and_an_error_inside(counted):
    model = build()
    outer = nn.Sequential(model, Attention())
    intercept(model, sample=X)
    counted.clear()
    outer(X)
    assert len(counted) == 2
    with pytest.raises(RuntimeError):
        model(X[:, :, :3])
    counted.clear()
    outer[1](X)
    assert not counted
    model(X)
    assert len(counted) == 2


def test_gradients_flow(counted):
    model, plain = build(), build()
    intercept(model, sample=X)
    for each in (model, plain):
        each(X).square().sum().backward()
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def test_copies_keep_it(counted):
    model = build()
    intercept(model, sample=X)
    other = copy.deepcopy(model)
    counted.clear()
    other(X)
    assert len(counted) == 2


def test_pytorchs_own_multi_head_attention(counted):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    with torch.no_grad():
        wanted = model(X)
        with intercept(model, sample=X):
            counted.clear()
            torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)
            assert len(counted) == 2


@torch.no_grad()
def test_a_family_that_never_asks_the_registry(counted):
    from transformers import FalconConfig, FalconForCausalLM

    torch.manual_seed(0)
    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    config._attn_implementation = "sdpa"
    model = FalconForCausalLM(config).eval()
    ids = torch.randint(0, 64, (2, 12))
    wanted, settings = model(ids).logits, {"max_new_tokens": 6, "do_sample": False}
    tokens = model.generate(ids, **settings)
    with intercept(model) as interception:
        assert interception.calls == 2
        counted.clear()
        torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-4, atol=1e-4)
        assert len(counted) == 2
        assert torch.equal(model.generate(ids, **settings), tokens)


def test_another_exact_plugin_gets_the_causal_calls(monkeypatch, counted):
    from hf_attn_plugins.tiled import entry

    calls, inner = [], entry.attention
    monkeypatch.setattr(entry, "attention", lambda *a, **k: calls.append(a[3].causal) or inner(*a, **k))
    other = dataclasses.replace(PLUGINS["tiled_attention"], name="other_attention", exact=True)
    monkeypatch.setitem(PLUGINS, "other_attention", other)
    model = build()
    wanted = model(X)
    with intercept(model, "other_attention", sample=X):
        calls.clear()
        torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)
        assert calls == [True, True]


def test_cqs_attention_gets_the_causal_calls():
    model = build()
    wanted = model(X)
    with intercept(model, "cqs_attention", sample=X):
        torch.testing.assert_close(model(X), wanted, rtol=1e-4, atol=1e-5)


class TestRefusals:
    def test_a_model_that_makes_no_call(self):
        from transformers import BloomConfig, BloomForCausalLM

        model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2))
        with pytest.raises(ValueError, match="makes no scaled_dot_product_attention call"):
            intercept(model)
        assert not model._forward_hooks

    def test_calls_that_are_not_equal(self, monkeypatch):
        inner = module.attend
        monkeypatch.setattr(module, "attend", lambda *a, **k: inner(*a, **{**k, "scale": 0.1}))
        model = build().train()
        with pytest.raises(ValueError, match="not equal, nothing was routed"):
            intercept(model, sample=X)
        assert model.training and not model._forward_hooks and not model._forward_pre_hooks

    def test_an_approximate_or_unknown_plugin(self, monkeypatch):
        rough = dataclasses.replace(PLUGINS["tiled_attention"], name="rough_attention", exact=False)
        monkeypatch.setitem(PLUGINS, "rough_attention", rough)
        for name, message in (("rough_attention", "is not exact"), ("nonesuch", "is no plugin")):
            with pytest.raises(ValueError, match=message):
                intercept(build(), name, sample=X)

    def test_a_model_without_a_vocabulary_needs_a_sample(self):
        with pytest.raises(ValueError, match="pass sample="):
            intercept(build())


class TestFunction:
    @pytest.mark.parametrize("shape", [(5, 8), (2, 5, 8), (2, 3, 5, 8), (2, 2, 3, 5, 8)])
    @pytest.mark.parametrize("kind", ["none", "causal", "bool", "float"])
    def test_equals_pytorchs(self, shape, kind):
        generator = torch.Generator().manual_seed(0)
        if len(shape) < 3:
            with pytest.raises(ValueError, match="at least"):
                scaled_dot_product_attention(*(torch.zeros(shape) for _ in range(3)))
            return
        q, k, v = (torch.randn(*shape[:-2], n, 8, generator=generator).double() * 2 for n in (5, 7, 7))
        arguments = {"is_causal": kind == "causal"}
        if kind == "bool":
            mask = torch.rand(5, 7, generator=generator) > 0.4
            mask[:, 0] = True
            arguments["attn_mask"] = mask
        elif kind == "float":
            arguments["attn_mask"] = torch.randn(*shape[:-3], 1, 5, 7, generator=generator).double().squeeze(-3)
            if len(shape) > 3:
                arguments["attn_mask"] = arguments["attn_mask"].unsqueeze(-3)
        ref = F.scaled_dot_product_attention(q, k, v, **arguments)
        torch.testing.assert_close(scaled_dot_product_attention(q, k, v, **arguments), ref, rtol=1e-9, atol=1e-9)

        def low(x):
            return x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

        arguments = {name: low(value) for name, value in arguments.items()}
        plain = F.scaled_dot_product_attention(low(q), low(k), low(v), **arguments)
        assert_close_to_reference(scaled_dot_product_attention(low(q), low(k), low(v), **arguments), plain, ref)

    def test_scale_and_shared_heads(self):
        q, k = torch.randn(2, 4, 5, 8).double(), torch.randn(2, 2, 5, 8).double()
        ref = F.scaled_dot_product_attention(q, k, k, scale=0.7, enable_gqa=True)
        torch.testing.assert_close(scaled_dot_product_attention(q, k, k, scale=0.7, enable_gqa=True), ref)
        with pytest.raises(ValueError, match="enable_gqa"):
            scaled_dot_product_attention(q, k, k)
        with pytest.raises(ValueError, match="exclude each other"):
            scaled_dot_product_attention(q, q, q, torch.ones(5, 5, dtype=torch.bool), is_causal=True)
