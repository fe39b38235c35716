"""What is said at load: options that do not run, misspelt names; and `configure(activate=True)` keeps its name."""

from __future__ import annotations

import logging

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_attn_plugins as hap
from hf_attn_plugins.hf.compat import config_carries_attention
from hf_attn_plugins.hf.inputs.load import settle
from hf_attn_plugins.hf.models import loading
from tests.families import build


@pytest.fixture
def saved(tmp_path):
    """A folder whose config holds options of star, and no name."""
    model = build("llama")
    hap.configure(model, "star_attention", block_size=16)
    model.save_pretrained(tmp_path)
    return tmp_path


def load(caplog, folder, cls=AutoModelForCausalLM, **options):
    caplog.clear()
    with caplog.at_level(logging.WARNING, "hf_attn_plugins"):
        return cls.from_pretrained(folder, **options), [
            r.message for r in caplog.records if r.name == "hf_attn_plugins"
        ]


def test_options_that_do_not_run_are_a_warning(saved, caplog):
    for cls in (AutoModelForCausalLM, type(build("llama"))):
        _, said = load(caplog, saved, cls)
        assert len(said) == 1 and "runs sdpa, although its config holds options of star_attention" in said[0]
        assert "set_attn_implementation('star_attention')" in said[0]


def test_a_choice_is_no_warning(saved, caplog):
    for options in (dict(attn_implementation="sdpa"), dict(attn_implementation="star_attention")):
        assert load(caplog, saved, **options)[1] == []
    with loading.without_warning():
        assert load(caplog, saved)[1] == []
    plain = build("llama")
    plain.save_pretrained(saved / "plain")
    assert load(caplog, saved / "plain")[1] == []


@pytest.mark.skipif(not config_carries_attention(), reason="this Transformers overwrites what config.json chooses")
def test_activate_switches_and_survives_saving(tmp_path, caplog):
    model = build("llama")
    hap.configure(model, "star_attention", block_size=16, activate=True)
    assert model.config._attn_implementation == "star_attention"
    model.save_pretrained(tmp_path)
    again, said = load(caplog, tmp_path)
    assert again.config._attn_implementation == "star_attention" and said == []
    assert again.config.hf_attn_plugins["star_attention"] == {"block_size": 16}
    again.set_attn_implementation("sdpa")
    again.save_pretrained(tmp_path / "sdpa")
    back, said = load(caplog, tmp_path / "sdpa")
    assert back.config._attn_implementation == "sdpa" and len(said) == 1


def test_configure_says_that_it_does_not_switch(caplog):
    model = build("llama")
    with caplog.at_level(logging.INFO, "hf_attn_plugins"):
        hap.configure(model, "star_attention", block_size=16)
    assert "the model still runs sdpa; activate=True switches" in caplog.text
    with pytest.raises(ValueError, match="did you mean 'block_size'"):
        hap.configure(model, "star_attention", blocksize=4, activate=True)
    assert model.config._attn_implementation == "sdpa"


def test_a_misspelt_attention_is_recognised_everywhere(saved):
    model = build("llama")
    with pytest.raises(ValueError, match="did you mean 'star_attention'"):
        model.from_pretrained(saved, attn_implementation="star_atention")
    with pytest.raises(ValueError, match=r"Attentions of hf_attn_plugins: tiled_attention, .*did you mean 'star"):
        AutoModelForCausalLM.from_pretrained(saved, attn_implementation="star")
    with pytest.raises(ValueError, match="did you mean 'tiled_attention'"), hap.use(model, "tilde"):
        pass
    with pytest.raises(ValueError, match="did you mean 'star_attention'"):
        hap.check(model, "star_atention")


def test_loading_is_as_it_was_after_unregistering():
    assert hasattr(vars(PreTrainedModel)["from_pretrained"].__func__, "unwatched")
    hap.unregister()
    try:
        assert not hasattr(vars(PreTrainedModel)["from_pretrained"].__func__, "unwatched")
    finally:
        hap.register()
    assert hasattr(vars(PreTrainedModel)["from_pretrained"].__func__, "unwatched")


def test_two_processes_may_convert_the_small_model_at_once(tmp_path):
    first, second, target = (tmp_path / name for name in ("first", "second", "target"))
    for folder in (first, second):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    settle(first, target)
    settle(second, target)  # the other was faster
    assert (target / "config.json").is_file() and second.exists()
    (target / "config.json").rename(target / "half")
    with pytest.raises(OSError):
        settle(second, target)
