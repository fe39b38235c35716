"""A star cache is refused by models that would compute other keys and values, and by no others."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import return_and_correct_aliasing

from hf_attn_plugins import star
from hf_attn_plugins.star.hf.fingerprint import fingerprint

from .families import tiny, tokens

CHANGE_NOTHING = {
    "pad_token_id": 2,
    "eos_token_id": [2, 3],
    "bos_token_id": 7,
    "id2label": {0: "a"},
    "output_hidden_states": True,
    "output_attentions": False,
    "initializer_range": 0.5,
    "use_cache": False,
    "attention_dropout": 0.1,
    "default_of_a_later_release": 1,
    "hf_attn_plugins": {"tiled_attention": {}},
    "architectures": ["Other"],
    "transformers_version": "9.9",
}
CHANGE_KEYS = {
    "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 123.0},
    "attention_bias": True,
    "hidden_act": "gelu",
}


@pytest.mark.parametrize("field", CHANGE_NOTHING)
def test_fields_that_change_nothing(field):
    model = tiny("llama")
    before = fingerprint(model)
    setattr(model.config, field, CHANGE_NOTHING[field])
    assert fingerprint(model) == before


@pytest.mark.parametrize("field", CHANGE_KEYS)
def test_fields_that_change_keys(field):
    model = tiny("llama")
    before = fingerprint(model)
    setattr(model.config, field, CHANGE_KEYS[field])
    assert fingerprint(model) != before


def test_head_and_added_tokens_change_nothing():
    model = tiny("llama")
    cache = star.encode(model, tokens(29), block_size=8)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 2)
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    assert star.ask(model, cache, [tokens(4)[0]], max_new_tokens=2)[0].numel() == 2


@pytest.mark.parametrize("place", ["embed_tokens", "layers.0.self_attn.v_proj", "layers.1.mlp.up_proj"])
def test_weights_change_it(place):
    model = tiny("llama")
    before = fingerprint(model)
    model.model.get_submodule(place).weight.data.mul_(1.5)
    assert fingerprint(model) != before


def test_the_whole_model_has_a_head():
    model = tiny("llama")
    before = fingerprint(model), fingerprint(model, whole=True)
    model.lm_head.weight.data[0, 0] += 1
    assert fingerprint(model) == before[0] and fingerprint(model, whole=True) != before[1]


def test_dtype_and_family_change_it():
    prints = {fingerprint(tiny(*each)) for each in [("llama",), ("llama", torch.bfloat16), ("qwen3",), ("mistral",)]}
    assert len(prints) == 4


class Packed(torch.Tensor):
    """A quantised weight as torchao makes them: a tensor of tensors that dispatches few operations."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            made = cls(args[0].codes, args[0].scale)
            return return_and_correct_aliasing(func, args, kwargs or {}, made)
        raise NotImplementedError(f"Packed dispatch: {func}")


def packed(model, factor=1.0):
    for layer in model.model.layers:
        weight = layer.self_attn.k_proj.weight.data
        scale = weight.abs().amax(1, keepdim=True) / 127
        layer.self_attn.k_proj.weight = torch.nn.Parameter(
            Packed((weight / scale).round().to(torch.int8), scale * factor), requires_grad=False
        )
    return model


def test_a_tensor_of_tensors_is_looked_into():
    one, same, other = packed(tiny("llama")), packed(tiny("llama")), packed(tiny("llama"), 1.01)
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)


def test_weights_that_a_first_call_packs_anew():
    """As bitsandbytes does with 4-bit weights on a CPU: only the state beside them keeps its meaning."""
    from types import SimpleNamespace

    model = tiny("llama")
    weight = model.model.layers[0].self_attn.k_proj.weight
    weight.quant_state = SimpleNamespace(shape=weight.shape, quant_type="nf4")
    before = fingerprint(model)
    weight.data = weight.data.flatten().flip(0).unsqueeze(1)
    assert fingerprint(model) == before
    weight.quant_state.quant_type = "fp4"
    assert fingerprint(model) != before


@pytest.mark.parametrize("config", ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"])
def test_torchao(config):
    quantization = pytest.importorskip("torchao.quantization")
    model = tiny("llama", torch.float32)
    quantization.quantize_(model, getattr(quantization, config)())
    cache = star.encode(model, tokens(29), block_size=8)
    assert star.ask(model, cache, [tokens(4)[0]], max_new_tokens=2)[0].numel() == 2
