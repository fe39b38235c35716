"""`use` dry-runs a model once, and again as soon as anything that its verdict came from has changed."""

from __future__ import annotations

import gc
import weakref
from unittest import mock

import pytest
import torch
import transformers as hf

import hf_attn_plugins as hap
from hf_attn_plugins.hf import check


def llama():
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                       num_key_value_heads=2)
    )  # fmt: skip


def runs(model, name="tiled_attention"):
    """How many dry runs one `use` takes."""
    with mock.patch.object(check, "dry_run", side_effect=check.dry_run) as ran, hap.use(model, name):
        return ran.call_count


def another_forward(model):
    layer = model.model.layers[0].self_attn
    layer.forward = layer.forward


def another_layer(model):
    model.model.layers[1] = llama().model.layers[1].to(torch.float64)


CHANGES = {
    "config": lambda model: setattr(model.config, "sliding_window", 8),
    "plugin's options": lambda model: hap.configure(model, "tiled_attention", kernel="reference"),
    "attribute": lambda model: setattr(model.model.layers[1].self_attn, "is_causal", False),
    "layer": another_layer,
    "class": lambda model: setattr(model.model, "norm", torch.nn.Identity()),
    "forward": another_forward,
}


def test_a_verdict_is_kept_per_model_and_plugin():
    model = llama()
    assert [runs(model), runs(model), runs(model, "cqs_attention"), runs(model), runs(llama())] == [1, 0, 1, 0, 1]


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_asked_again_after_a_change(change):
    model = llama()
    assert runs(model) == 1
    CHANGES[change](model)
    assert runs(model) == 1


def test_a_refusal_is_not_kept():
    model = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=64, hidden_size=16, n_layer=1, n_head=2))
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot be used with Bloom"), hap.use(model, "tiled_attention"):
            pass


def test_models_are_freed():
    model = llama()
    runs(model)
    there = weakref.ref(model)
    del model
    gc.collect()
    assert there() is None
