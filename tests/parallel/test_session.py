"""The verb itself: what it changes and undoes, and what it refuses; the session of a launch, here with one rank."""

from __future__ import annotations

import contextlib
import logging

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

import hf_attn_plugins as hap
from hf_attn_plugins.core.warn import forget_warnings
from hf_attn_plugins.parallel import Group
from hf_attn_plugins.parallel.hf.context_parallel import _session
from hf_attn_plugins.parallel.method import method_for as method
from tests import families
from tests.parallel.models import build, prompt

STAR = dict(block_size=5, anchor_size=3, query_size=4)


@contextlib.contextmanager
def session(model, name="star_attention", **options):
    with _session(model, Group.alone(), method(name, **options), {}) as found:
        yield found


def state(model):
    hooks = [
        (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._forward_hooks_always_called))
        for module in model.modules()
    ]
    names = set(AttentionInterface._global_mapping) | set(AttentionMaskInterface._global_mapping)
    return hooks, names, model.config._attn_implementation, getattr(model.config, "hf_attn_plugins", None)


@pytest.mark.parametrize("fails", (False, True))
def test_everything_is_undone(fails):
    model = build("llama")
    before = state(model)
    with contextlib.suppress(KeyError), session(model, **STAR):
        model.generate(**prompt(23, 1), max_new_tokens=2)
        assert state(model) != before
        if fails:
            raise KeyError("a mistake in the body")
    assert state(model) == before
    with contextlib.suppress(KeyError), hap.context_parallel(model, "star_attention", **STAR):
        if fails:
            raise KeyError("a mistake in the body")
    assert state(model) == before


@pytest.mark.parametrize("name", ("star_attention", "tiled_attention"))
@pytest.mark.parametrize("family", ("llama", "gemma3"))
def test_a_launch_of_one_rank_is_the_plugin(name, family):
    model, inputs = build(family), prompt(23, 3, padding=4)
    options = STAR if name == "star_attention" else {}
    arguments = dict(max_new_tokens=5, do_sample=False)
    with session(model, name, **options) as cp:
        found = model.generate(**inputs, **arguments)
        assert cp.prefill_tokens == 23 and cp.loads == [27] and cp.cache_bytes > 0
    with hap.use(model, name, **options):
        assert torch.equal(found, model.generate(**inputs, **arguments))


def test_crop_and_later_rows():
    """A cache that was cut back gives what it gave before it grew."""
    model, inputs = build("llama"), prompt(23, 2, padding=4)
    more = prompt(4, 2, seed=1)["input_ids"]
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 4, dtype=torch.long)], 1)
    with session(model, **STAR), torch.no_grad():
        cache = model(**inputs).past_key_values
        first = model(more, attention_mask=mask, past_key_values=cache).logits
        assert cache.get_seq_length() == 27
        cache.crop(-4)
        assert cache.get_seq_length() == 23
        again = model(more, attention_mask=mask, past_key_values=cache).logits
    assert torch.equal(first, again)


def test_what_cannot_be_cut_is_refused():
    model, inputs = build("llama"), prompt(23, 1)
    used = DynamicCache()
    used.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8), 0)
    with session(model, **STAR):
        with pytest.raises(ValueError, match="a StaticCache of 0 tokens: pass no cache"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(ValueError, match="a DynamicCache of 3 tokens"):
            model(**inputs, past_key_values=used)
        with pytest.raises(ValueError, match="an attention mask of shape"):
            model(inputs["input_ids"], attention_mask=torch.ones(1, 1, 23, 23, dtype=torch.bool))
        with pytest.raises(NotImplementedError, match="output_hidden_states"):
            model(**inputs, output_hidden_states=True)
        with pytest.raises(NotImplementedError, match="'token_type_ids'"):
            model(**inputs, token_type_ids=torch.zeros(1, 23, dtype=torch.long))
        found = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    with pytest.raises(RuntimeError, match="grows inside"):
        model(inputs["input_ids"], past_key_values=_cache_of(model, inputs))
    assert found.shape == (1, 25)


def _cache_of(model, inputs):
    with session(model, **STAR):
        return model(**inputs).past_key_values


@pytest.mark.parametrize("family", ("bamba", "t5"))
def test_models_without_causal_keys_are_refused(family):
    with pytest.raises((NotImplementedError, ValueError)) as raised, session(families.build(family)):
        pass
    assert "\n" not in str(raised.value)


def test_a_model_elsewhere_is_refused():
    model = families.build("llama").to("meta")
    with pytest.raises(ValueError, match="its model is on meta: move it there first"), session(model):
        pass


def test_idle_ranks_are_told(caplog):
    forget_warnings()
    with caplog.at_level(logging.WARNING, logger="hf_attn_plugins"):
        method("star_attention", block_size=16, anchor_size=4, query_size=4).deal(
            torch.ones(1, 23, dtype=torch.bool), 0, 3
        )
    assert "makes 2 blocks of 16 tokens for 3 ranks, 1 of them have none: block_size=7 or less" in caplog.text
