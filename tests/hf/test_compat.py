"""Each difference between versions of Transformers and each private name of it: present, right, and missed aloud."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    LlamaConfig,
    PreTrainedModel,
    masking_utils,
)

from hf_attn_plugins.hf import compat
from hf_attn_plugins.hf.masks import compat as mask_compat
from tests.families import build, padded_batch


def sentence(name: str, purpose: str) -> str:
    """A regular expression for the one sentence of an upgrade that took `name` away."""
    version = transformers.__version__
    return rf"^transformers {version}.* has no .*{name}.* needs to {purpose}.*: install transformers=="


# Versions.


@pytest.mark.parametrize("version", ["4.57.6", "4.0", "3.5.1", "4.99.0.dev0"])
def test_older_versions_are_refused_in_one_line(version):
    with pytest.raises(ImportError, match=rf"needs transformers>=5.0, found {version}: upgrade it") as error:
        compat.refuse_old(version)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("version", ["5.0.0", "5.0.0rc1", "5.10.4", "6.0.0.dev0", transformers.__version__])
def test_supported_versions_are_not(version):
    compat.refuse_old(version)


def test_registration_refuses_an_old_version():
    """Whichever is imported first, the import that registers ends in that line."""
    code = "import transformers; transformers.__version__ = '4.57.6'; import {first}; import hf_attn_plugins"
    started = [
        subprocess.Popen([sys.executable, "-c", code.format(first=first)], stderr=subprocess.PIPE, text=True)
        for first in ("hf_attn_plugins, transformers.modeling_utils", "transformers.modeling_utils")
    ]
    for process in started:
        said = process.communicate()[1].splitlines()[-1]
        assert process.returncode == 1
        assert said.startswith("ImportError: hf_attn_plugins needs transformers>=5.0, found 4.57.6")


def test_queries_are_told_by_length_and_offset():
    assert mask_compat.query_range(7, 3, None, 10, 0) == (7, 3)
    counter = torch.tensor(3)
    count, first = mask_compat.query_range(1, counter, None, 10, 0)
    counter.add_(1)
    assert count == 1 and int(first) == 3, "a static cache's own counter must be copied"


@pytest.mark.parametrize(
    ("first", "count", "keys", "key_offset"), [(0, 5, 5, 0), (4, 3, 7, 0), (4, 1, 16, 0), (9, 4, 8, 5), (4, 4, 4, 4)]
)
def test_queries_are_told_by_positions(first, count, keys, key_offset):
    position = torch.arange(first, first + count)
    assert mask_compat.query_range(None, 0, position, keys, key_offset) == (count, first)
    assert mask_compat.query_range(position, 0, None, keys, key_offset) == (
        count,
        first,
    )  # given as the second argument


def test_queries_that_nothing_tells():
    with pytest.raises(NotImplementedError, match=sentence("q_length` or `cache_position", "build attention masks")):
        mask_compat.query_range(None, 0, None, 5, 0)


@pytest.mark.parametrize("how", ["as given", "up to 5.3", "from 5.4"])
@pytest.mark.parametrize("queries", [5, 2])
def test_mask_function_takes_both_calls(how, queries):
    from hf_attn_plugins.hf.masks.mask_function import mask_function

    given = {
        "up to 5.3": dict(cache_position=torch.arange(5 - queries, 5)),
        "from 5.4": dict(q_length=queries, q_offset=5 - queries, device="cpu"),
        "as given": dict(q_length=queries, q_offset=torch.tensor(5 - queries)),
    }[how]
    mask = mask_function(batch_size=2, kv_length=5, mask_function=masking_utils.causal_mask_function, **given)
    assert (
        mask.shape == (2, 1, queries, 5)
        and mask.structure.mask.causal
        and int(mask.structure.mask.offset) == 5 - queries
    )


def test_cache_goes_in_and_out():
    model = build("llama")
    ids, _ = padded_batch()
    with torch.no_grad():
        output = model(ids[:, :8], use_cache=True)
        cache = compat.returned_cache(output)
        assert cache.get_seq_length() == 8
        rest = model(ids[:, 8:], **{compat.cache_keyword(model): cache}).logits
        torch.testing.assert_close(rest, model(ids).logits[:, 8:], atol=1e-4, rtol=1e-4)
    compat.set_returned_cache(output, None)
    assert compat.returned_cache(output) is None


def test_cache_keyword_of_either_kind():
    class New(nn.Module):
        def forward(self, ids, cache=None):
            return ids

    class Old(nn.Module):
        def forward(self, ids, past_key_values=None):
            return ids

    assert compat.cache_keyword(New()) == "cache" and compat.cache_keyword(Old()) == "past_key_values"
    assert compat.returned_cache(SimpleNamespace(cache=1)) == compat.returned_cache(SimpleNamespace(past_key_values=1))


# Registries.


def test_names_are_listed_and_forgotten():
    AttentionInterface.register("of_a_test", lambda *args: None)
    AttentionMaskInterface.register("of_a_test", lambda *args: None)
    assert {"of_a_test", "sdpa", "tiled_attention"} <= compat.registered_names()
    compat.forget_attention("of_a_test")
    compat.forget_attention("of_a_test")
    assert "of_a_test" not in compat.registered_names()
    assert "of_a_test" not in masking_utils.ALL_MASK_ATTENTION_FUNCTIONS


def test_registered_functions():
    assert compat.registered_attention("sdpa") is AttentionInterface()["sdpa"]
    assert compat.registered_mask("sdpa") is AttentionMaskInterface()["sdpa"]
    assert compat.registered_attention("of_nobody") is None is compat.registered_mask("of_nobody")


@pytest.mark.parametrize("interface", [AttentionInterface, AttentionMaskInterface])
def test_registries_gone(interface, monkeypatch):
    for holder in interface.__mro__:  # a class that it derives from has a mapping of its own
        if "_global_mapping" in vars(holder):
            monkeypatch.delattr(holder, "_global_mapping")
    with pytest.raises(NotImplementedError, match=sentence("_global_mapping", "list and unregister")):
        compat.forget_attention("of_a_test")


def test_quantizer_tables(monkeypatch):
    from transformers.quantizers import auto, base

    configs, quantizers = compat.quantizer_tables()
    assert "bitsandbytes_8bit" in configs and "bitsandbytes_8bit" in quantizers
    assert issubclass(quantizers["bitsandbytes_8bit"], compat.quantizer_base())
    with monkeypatch.context() as patch:
        patch.delattr(base.HfQuantizer, "postprocess_model")
        with pytest.raises(NotImplementedError, match=sentence("postprocess_model", "bring first-layer tables back")):
            compat.quantizer_base()
    for name in ("AUTO_QUANTIZATION_CONFIG_MAPPING", "AUTO_QUANTIZER_MAPPING"):
        with monkeypatch.context() as patch:
            patch.delattr(auto, name)
            with pytest.raises(NotImplementedError, match=sentence(name, "bring first-layer tables back")):
                compat.quantizer_tables()


# Configs and models.


def test_implementation_of_a_config():
    config = build("llama").config
    assert compat.has_implementation(config) and not compat.has_implementation(SimpleNamespace())
    assert compat.implementation_of(config) == "sdpa" == config._attn_implementation
    compat.set_implementation(config, "eager")
    assert config._attn_implementation == "eager"
    with pytest.raises(NotImplementedError, match=sentence("_attn_implementation_internal", "read and restore")):
        compat.set_implementation(SimpleNamespace(), "eager")


def test_models_that_can_switch(monkeypatch):
    llama, bloom = build("llama"), transformers.BloomForCausalLM
    assert compat.can_switch_attention(llama) is True and compat.can_switch_attention(bloom) is False
    assert compat.can_switch_attention(nn.Linear(2, 2)) is None
    monkeypatch.delattr(PreTrainedModel, "_can_set_attn_implementation")
    with pytest.raises(NotImplementedError, match=sentence("_can_set_attn_implementation", "tell whether")):
        compat.can_switch_attention(llama)


def test_classes_that_run_with_sdpa(monkeypatch):
    assert compat.supports_sdpa(transformers.LlamaForCausalLM) is True
    assert compat.supports_sdpa(transformers.BloomForCausalLM) is False
    assert compat.supports_sdpa(nn.Linear) is None and compat.supports_sdpa(build) is None
    monkeypatch.delattr(PreTrainedModel, "_supports_sdpa")
    with pytest.raises(NotImplementedError, match=sentence("_supports_sdpa", "find a model's own attention")):
        compat.supports_sdpa(PreTrainedModel)


def test_modules_whose_weights_accelerate_moves():
    from accelerate.hooks import ModelHook, add_hook_to_module

    module = nn.Linear(2, 2)
    assert not compat.moves_weights(module)
    add_hook_to_module(module, ModelHook())
    assert compat.moves_weights(module)


def test_stateful_models(monkeypatch):
    assert compat.is_stateful(build("bamba")) and not compat.is_stateful(build("llama"))
    assert not compat.is_stateful(nn.Linear(2, 2))
    monkeypatch.delattr(PreTrainedModel, "_is_stateful")
    with pytest.raises(NotImplementedError, match=sentence("_is_stateful", "refuse recurrent")):
        compat.is_stateful(build("llama"))


def test_plain_loss(monkeypatch):
    from transformers.loss import loss_utils

    other = build("llama")
    other.loss_function = lambda *args, **kwargs: None
    assert compat.has_causal_lm_loss(build("llama")) and not compat.has_causal_lm_loss(other)
    assert not compat.has_causal_lm_loss(nn.Linear(2, 2))
    monkeypatch.delattr(loss_utils, "ForCausalLMLoss")
    with pytest.raises(NotImplementedError, match=sentence("ForCausalLMLoss", "cut a loss")):
        compat.has_causal_lm_loss(build("gpt2"))


def rotary():
    from tests.families import SMALL

    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**{**SMALL, "max_position_embeddings": 16}, rope_parameters=rope)
    return transformers.LlamaModel(config).rotary_emb


def test_frozen_rope_keeps_its_frequencies(monkeypatch):
    module, x, last = rotary(), torch.zeros(1), torch.tensor([[99]])
    before = module.inv_freq.clone()
    kind = compat.freeze_rope(module, ())
    module(x, last)
    assert torch.equal(module.inv_freq, before)
    module.rope_type = kind
    module(x, last)
    assert not torch.equal(module.inv_freq, before), "without freezing, position 99 changes them: the test can fail"
    from transformers import modeling_rope_utils

    monkeypatch.delattr(modeling_rope_utils, "dynamic_rope_update")
    with pytest.raises(NotImplementedError, match=sentence("dynamic_rope_update", "hold rotary")):
        compat.freeze_rope(module, ())


def test_frozen_rope_of_some_layer_types():
    module = SimpleNamespace(rope_type={"full_attention": "dynamic", "sliding_attention": "default"})
    before = compat.freeze_rope(module, ["full_attention"])
    assert module.rope_type == {"full_attention": "frozen", "sliding_attention": "default"}
    assert before == {"full_attention": "dynamic", "sliding_attention": "default"}


def test_rope_that_looks_at_something_else(monkeypatch):
    from transformers import modeling_rope_utils

    def dynamic_rope_update(forward):
        return forward

    monkeypatch.setattr(modeling_rope_utils, "dynamic_rope_update", dynamic_rope_update)
    with pytest.raises(NotImplementedError, match=sentence("rope_type", "hold rotary")):
        compat.freeze_rope(SimpleNamespace(rope_type="dynamic"), ())


# Caches.


def test_a_cache_grows_layers_of_ours(monkeypatch):
    class Layer(compat.dynamic_layer()):
        pass

    cache = DynamicCache()
    compat.grow_layers(cache, Layer)
    key = torch.randn(1, 2, 3, 4)
    cache.update(key, key, 0)
    assert type(cache.layers[0]) is Layer and torch.equal(cache.update(key, key, 0)[0], torch.cat([key, key], 2))
    with pytest.raises(NotImplementedError, match=sentence("layer_class_to_replicate", "keep keys and values")):
        compat.grow_layers(SimpleNamespace(), Layer)
    monkeypatch.delattr(transformers.cache_utils, "DynamicLayer")
    with pytest.raises(NotImplementedError, match=sentence("DynamicLayer", "keep keys and values")):
        compat.dynamic_layer()


def test_whether_the_configs_choice_is_read_at_load(tmp_path):
    model = build("llama")
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attn_implementation": "eager"}))
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == ("eager" if compat.config_carries_attention() else "sdpa")


# Masks.


def made(maker):
    """A mask function by each maker of Transformers, and the values that its cells must hold."""
    inner, segments = masking_utils.causal_mask_function, torch.tensor([[0, 0, 1]])
    arguments = {
        "and_masks": ((inner, inner), {"mask_functions": (inner, inner)}),
        "or_masks": ((inner, inner), {"mask_functions": (inner, inner)}),
        "sliding_window_overlay": ((5,), {"sliding_window": 5}),
        "sliding_window_bidirectional_overlay": ((5,), {"sliding_window": 5}),
        "chunked_overlay": ((4, segments), {"chunk_size": 4, "left_padding": segments}),
        "packed_sequence_mask_function": ((segments,), {"packed_sequence_mask": segments}),
        "remap_positions_for_packed_sequence": ((inner, segments), {"mask_function": inner, "position_ids": segments}),
    }[maker]
    if not hasattr(masking_utils, maker):
        pytest.skip(f"Transformers {transformers.__version__} has no {maker} yet")
    return getattr(masking_utils, maker)(*arguments[0]), arguments[1]


@pytest.mark.parametrize("maker", list(mask_compat.MAKERS))
def test_mask_functions_are_read(maker):
    function, cells = made(maker)
    assert mask_compat.MAKERS[maker] == set(cells), "what we say that we read is what this test looks at"
    assert mask_compat.mask_parts(function) == (maker, cells)


def test_other_functions_are_not_read():
    window = 5

    def mine(b, h, q, k):
        return q - k < window

    assert mask_compat.mask_parts(mine) is None and mask_compat.mask_parts(masking_utils.causal_mask_function) is None
    assert mask_compat.mask_parts(len) is None


def test_a_renamed_cell_is_not_read():
    def sliding_window_overlay(width):
        return lambda b, h, q, k: q - k < width

    function = sliding_window_overlay(5)
    function.__module__, function.__qualname__ = "transformers.masking_utils", "sliding_window_overlay.<locals>.inner"
    assert mask_compat.mask_parts(function) is None


def test_plain_masks(monkeypatch):
    causal, bidirectional = mask_compat.plain_masks()
    assert bool(causal(0, 0, 3, 3)) and not bool(causal(0, 0, 3, 4))
    assert bool(torch.as_tensor(bidirectional(0, 0, torch.tensor(3), torch.tensor(4))).all())
    for name in ("causal_mask_function", "bidirectional_mask_function"):
        with monkeypatch.context() as patch:
            patch.delattr(masking_utils, name)
            with pytest.raises(NotImplementedError, match=sentence(name, "recognise causal")):
                mask_compat.plain_masks()


def test_a_block_mask_passes_through_unchanged():
    """What `StructuredMask` is for: a mask that is prepared already is returned as it is."""
    from hf_attn_plugins.core.mask import Mask
    from hf_attn_plugins.hf.masks.structured_mask import Structure, StructuredMask

    model = build("llama")
    model.set_attn_implementation("tiled_attention")
    ids, _ = padded_batch()
    mask = StructuredMask(Structure(Mask(), (3, 1, 13, 13)))  # bidirectional, so that being passed through shows
    with torch.no_grad():
        seen = model(ids, attention_mask=mask, use_cache=False).logits
        full = torch.ones(3, 1, 13, 13, dtype=torch.bool)
        expected = model(ids, attention_mask=full, use_cache=False).logits
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-4)


def test_a_config_field_is_what_getattr_says():
    class Named(LlamaConfig):
        attribute_map = {"kept": "vocab_size"}
        shared = 3

    class Answering(LlamaConfig):
        def __getattr__(self, name):
            if name == "kept":
                return 4
            raise AttributeError(name)

    config = LlamaConfig(vocab_size=7)
    assert compat.config_field(config, "kept") is None
    config.kept = {"tiled_attention": {}}
    assert compat.config_field(config, "kept") is config.kept
    named = Named(vocab_size=7)
    assert (compat.config_field(named, "kept"), compat.config_field(named, "shared")) == (7, 3)
    assert compat.config_field(Answering(), "kept") == 4
    assert compat.config_field(SimpleNamespace(kept=5), "kept") == 5 and compat.config_field(None, "kept") is None
