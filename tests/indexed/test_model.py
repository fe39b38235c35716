"""`CharacterWordEncoder` as a Transformers model: saved, loaded by AutoConfig and AutoModel, trained, frozen."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModel

from hf_attn_plugins import register
from hf_attn_plugins.indexed import direct_attention
from hf_attn_plugins.indexed.hf.config import CharacterWordEncoderConfig
from hf_attn_plugins.indexed.hf.model import CharacterWordEncoder

register()
WORDS = ["apple", "Apples", "pear", "", "x" * 40]
SETTINGS = {"max_word_length": 12, "hidden_size": 16, "num_attention_heads": 2}


def encoder(**changes) -> CharacterWordEncoder:
    torch.manual_seed(0)
    return CharacterWordEncoder(CharacterWordEncoderConfig(**{**SETTINGS, **changes}))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"combiner": "concatenate", "learned_positions": True, "alphabet": "abcdefgh"},
        {"head_dim": 16, "combiner_outputs": 3, "tie_positions": True, "mask_padding": False, "form": "direct"},
    ],
)
@torch.no_grad()
def test_save_and_load(tmp_path, changes):
    model = encoder(**changes)
    wanted = model.encode(WORDS)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, CharacterWordEncoderConfig)
    for name, value in {**SETTINGS, **changes}.items():
        assert getattr(config, name) == value
    for loaded in (AutoModel.from_pretrained(tmp_path), CharacterWordEncoder.from_pretrained(tmp_path)):
        assert isinstance(loaded, CharacterWordEncoder)
        assert torch.equal(loaded.encode(WORDS), wanted)
        assert loaded.encoder.attention.form == config.form


def test_it_is_known_without_being_imported():
    """The hook costs nothing until Transformers is asked for a config or a model."""
    code = (
        "import sys, hf_attn_plugins as hap; hap.register(); hap.register()\n"
        "assert 'transformers' not in sys.modules\n"
        "from transformers import AutoConfig\n"
        "config = AutoConfig.for_model('character_word_encoder', hidden_size=16, num_attention_heads=2)\n"
        "assert 'hf_attn_plugins.indexed.hf.model' not in sys.modules\n"
        "from transformers import AutoModel\n"
        "print(type(AutoModel.from_config(config)).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "CharacterWordEncoder"


@torch.no_grad()
def test_the_forward_pass_is_that_of_its_parts():
    model = encoder(combiner="concatenate")
    ids = model.config.vocabulary().encode(WORDS)
    inner = model.encoder
    own, of_positions = inner.attention.weights()
    heads = direct_attention(inner.embedding.weight, inner.positions, ids, own, of_positions, heads=2, padding_index=0)
    wanted = heads.flatten(1) @ inner.combiner.output.weight.T
    torch.testing.assert_close(model(ids).last_hidden_state, wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(model(ids, return_dict=False)[0], model(ids).last_hidden_state)
    assert torch.equal(model.encode(WORDS), model(ids).last_hidden_state)
    assert model.encode(WORDS)[3].abs().max() == 0  # the empty word


@torch.no_grad()
def test_frozen_it_gives_the_same_and_follows_its_weights():
    model = encoder()
    wanted = model.encode(WORDS)
    model.freeze()
    torch.testing.assert_close(model.encode(WORDS), wanted)
    assert not model.training
    model.encoder.attention.value.weight.mul_(2)
    assert (model.encode(WORDS) - wanted).abs().max() > 1e-3
    torch.testing.assert_close(model.encode(WORDS), model.unfreeze().encode(WORDS))


def test_it_trains():
    model = encoder()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    target = torch.randn(len(WORDS), 8).tanh()
    losses = []
    for _ in range(30):
        loss = (model.encode(WORDS) - target)[:3].square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match="combiner='sum'"):
        encoder(combiner="sum")
    with pytest.raises(ValueError, match="pass head_dim"):
        encoder(num_attention_heads=3)
