"""`hf-attn patch rope-freeze`: equal at the frozen length, the same at every other."""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from hf_attn_plugins.patches import command
from transformers import AutoModelForCausalLM, Phi3Config, Phi3ForCausalLM

from .families import FAMILIES, SIZES, checkpoint, fingerprint


def patch(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(a) for a in arguments]))


DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
IDS = torch.randint(3, 97, (1, 96), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(folder, ids):
    return AutoModelForCausalLM.from_pretrained(folder)(ids).logits


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_becomes_what_it_is_at_the_length(tmp_path, capsys, family, sharded):
    changes = {"rope_parameters": dict(DYNAMIC), "max_position_embeddings": 32}
    source, target = checkpoint(tmp_path / "source", family, sharded, **changes), tmp_path / "target"
    before = fingerprint(source)
    patch("rope-freeze", source, target, "--max-length", "96")
    assert "dynamic with base 10000 becomes plain RoPE" in capsys.readouterr().out
    assert fingerprint(source) == before
    torch.testing.assert_close(logits(target, IDS), logits(source, IDS), rtol=1e-3, atol=1e-3)
    # A prefix alone and the same prefix of a longer input: they differ before, and agree after.
    prefix = IDS[:, :40]
    assert (logits(source, prefix) - logits(source, IDS)[:, :40]).abs().max() > 1e-2
    torch.testing.assert_close(logits(target, prefix), logits(target, IDS)[:, :40], rtol=1e-3, atol=1e-3)
    patch("--undo", target)
    assert fingerprint(target) == before


def test_short_lengths_keep_the_base(tmp_path):
    source = checkpoint(tmp_path / "a", rope_parameters=dict(DYNAMIC), max_position_embeddings=32)
    patch("rope-freeze", source, tmp_path / "b", "--max-length", "32")
    rope = json.loads((tmp_path / "b" / "config.json").read_text())["rope_parameters"]
    assert rope["rope_type"] == "default" and rope["rope_theta"] == 10000.0


def test_configs_of_transformers_4(tmp_path):
    source = checkpoint(tmp_path / "a", rope_parameters=dict(DYNAMIC), max_position_embeddings=32)
    config = json.loads((source / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 4.0}}
    (source / "config.json").write_text(json.dumps(config))
    patch("rope-freeze", source, tmp_path / "b", "--max-length", "96")
    torch.testing.assert_close(logits(tmp_path / "b", IDS), logits(source, IDS), rtol=1e-3, atol=1e-3)
    assert json.loads((tmp_path / "b" / "config.json").read_text())["rope_theta"] > 10000.0


def longrope(folder):
    torch.manual_seed(0)
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0, 3.0, 4.0, 5.0], "rope_theta": 1e4}
    config = Phi3Config(**{**SIZES, "rope_parameters": rope, "original_max_position_embeddings": 32})
    model = Phi3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("length", "kept"), [(96, "long"), (32, "short")])
def test_longrope_keeps_the_factors_of_the_length(tmp_path, capsys, length, kept):
    source, target = longrope(tmp_path / "source"), tmp_path / "target"
    patch("rope-freeze", source, target, "--max-length", length)
    assert f"keeps its {kept} factors" in capsys.readouterr().out
    ids = IDS[:, :length]
    torch.testing.assert_close(logits(target, ids), logits(source, ids), rtol=1e-3, atol=1e-3)
    prefix = IDS[:, :20]
    torch.testing.assert_close(logits(target, prefix), logits(target, IDS)[:, :20], rtol=1e-3, atol=1e-3)
    assert (logits(source, prefix) - logits(source, IDS)[:, :20]).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("rope", "length", "message"),
    [({"rope_type": "default", "rope_theta": 1e4}, 96, "nothing changes with length"), (DYNAMIC, 0, "--max-length 0")],
)
def test_what_cannot_be_frozen_is_refused(tmp_path, rope, length, message):
    source = checkpoint(tmp_path / "source", rope_parameters=dict(rope))
    before = fingerprint(tmp_path)
    with pytest.raises(ValueError, match=message):
        patch("rope-freeze", source, tmp_path / "target", "--max-length", length)
    assert fingerprint(tmp_path) == before
