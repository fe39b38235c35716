"""Wrapped models: looked through by every verb, or refused in one line."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hf_attn_plugins as hap
from hf_attn_plugins.hf.models.unwrap import language_model, unwrapped
from tests.families import build

IDS = torch.randint(5, 90, (1, 24), generator=torch.Generator().manual_seed(0))


class FullyShardedDataParallel(nn.Module):
    """Recognised by its name and package, as the real one is."""

    __module__ = "torch.distributed.fsdp.fully_sharded_data_parallel"


class PeftModel(nn.Module):
    __module__ = "peft.peft_model"

    def __init__(self, base, prompt=False):
        super().__init__()
        self.base, self.active_peft_config = base, type("Config", (), {"is_prompt_learning": prompt})()

    def get_base_model(self):
        return self.base


def wrappers(model):
    return {
        "none": model,
        "DataParallel": nn.DataParallel(model),
        "compiled": torch.compile(model, backend="eager"),
        "compiled DataParallel": torch.compile(nn.DataParallel(model), backend="eager"),
        "peft": PeftModel(model),
    }


@pytest.mark.parametrize("kind", list(wrappers(nn.Linear(1, 1))))
def test_every_verb_looks_through_a_wrapper(kind):
    model = build("llama")
    wrapped = wrappers(model)[kind]
    assert unwrapped(wrapped) is model
    assert hap.check(wrapped, "tiled_attention").model_class == type(model).__name__
    hap.configure(wrapped, "star_attention", block_size=8)
    assert model.config.hf_attn_plugins["star_attention"]["block_size"] == 8
    with hap.use(wrapped, "tiled_attention") as given:
        assert given is wrapped and model.config._attn_implementation == "tiled_attention"
    assert model.config._attn_implementation != "tiled_attention"
    with hap.context_parallel(wrapped, "tiled_attention"):
        pass
    assert hap.compare(wrapped, IDS, "tiled_attention").kl_mean < 1e-6
    cache = hap.star.encode(wrapped, IDS, block_size=8)
    assert len(hap.star.ask(wrapped, cache, [IDS[0, :3]], max_new_tokens=2, min_new_tokens=2)[0]) == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (FullyShardedDataParallel(), "summon_full_params"),
        (PeftModel(nn.Linear(1, 1), prompt=True), "learned prompt"),
        (nn.Sequential(nn.Linear(1, 1)), "no model of Transformers"),
    ],
)
def test_what_cannot_be_looked_through_is_refused_in_one_line(model, message):
    for verb in (language_model, lambda m: hap.compare(m, IDS, "tiled_attention"), lambda m: hap.star.encode(m, IDS)):
        with pytest.raises(ValueError, match=message) as raised:
            verb(model)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match=message), hap.use(model, "tiled_attention"):
        pass
    with pytest.raises(TypeError, match="a model is needed"):
        unwrapped("path")
