"""`hf-attn patch` and code that a checkpoint brings along: run with --trust-remote-code only, and never asked for."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, dynamic_module_utils

from hf_attn_plugins import cli

from .families import checkpoint_with_code, fingerprint

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
RECIPES = {
    "set-attention": ["--attn", "star_attention", "--block-size", "8"],
    "rope-freeze": ["--max-length", "96"],
}


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on stdin"))
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return checkpoint_with_code(tmp_path / "source", rope_parameters=DYNAMIC, max_position_embeddings=32)


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_is_refused_in_one_line(source, tmp_path, capsys, recipe):
    before = fingerprint(source)
    assert cli.main(["patch", recipe, str(source), str(tmp_path / "target"), *RECIPES[recipe]]) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--trust-remote-code" in said and str(source) in said
    assert fingerprint(source) == before and not (tmp_path / "target").exists()


def test_first_layer_tables_refuse_it(source, tmp_path, capsys):
    assert cli.main(["patch", "first-layer", str(source), str(tmp_path / "target")]) == 2
    assert str(source) in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "target").exists()


@torch.no_grad()
def test_the_choice_is_written_where_it_is_trusted(source, tmp_path):
    target = tmp_path / "target"
    assert cli.main(["patch", "set-attention", str(source), str(target), "--trust-remote-code",
                     *RECIPES["set-attention"]]) == 0  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
    assert type(model).__name__ == "Model" and model.config._attn_implementation == "star_attention"


def test_a_rope_is_frozen_where_it_is_trusted(source, tmp_path):
    target = tmp_path / "target"
    assert cli.main(["patch", "rope-freeze", str(source), str(target), "--trust-remote-code",
                     *RECIPES["rope-freeze"]]) == 0  # fmt: skip
    assert json.loads((target / "config.json").read_text())["rope_parameters"]["rope_type"] == "default"
    assert AutoConfig.from_pretrained(target, trust_remote_code=True).rope_parameters["rope_theta"] > 10000


def test_check_builds_the_class_that_the_code_names(source):
    assert cli.main(["check", str(source), "--attn", "star_attention", "--trust-remote-code"]) == 0
