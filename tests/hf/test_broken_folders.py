"""Folders that cannot be loaded: one line that names the folder, whatever Transformers or safetensors raised."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

from hf_attn_plugins.cli import main
from hf_attn_plugins.hf.inputs.load import load, model_without_weights, read_config
from tests.eval.tiny import tokenizer
from tests.families import build


@pytest.fixture
def folder(tmp_path):
    build("llama").save_pretrained(tmp_path)
    tokenizer().save_pretrained(tmp_path)
    return tmp_path


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def other_shapes(folder):
    fields(folder, intermediate_size=999)


def fields(folder, **changed):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))


BROKEN = {
    "weights cut short": cut_weights,
    "weights of other shapes": other_shapes,
    "a list for the tokenizer's settings": lambda folder: (folder / "tokenizer_config.json").write_text("[]"),
    "a size as text": lambda folder: fields(folder, hidden_size="x"),
    "no heads": lambda folder: fields(folder, num_attention_heads=0),
    "an unknown activation": lambda folder: fields(folder, hidden_act="nope"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_one_line(folder, kind, capsys):
    BROKEN[kind](folder)
    with pytest.raises(ValueError, match="cannot load") as raised:
        load(str(folder), "float32", "cpu")
    assert "\n" not in str(raised.value) and str(folder) in str(raised.value)
    assert main(["compare", str(folder), "--length", "64", "--device", "cpu"]) == 2
    assert capsys.readouterr().err.count("\n") <= 2


def test_a_config_that_describes_no_model_is_one_line(folder, capsys):
    fields(folder, hidden_act="nope")
    with pytest.raises(ValueError, match=r"cannot load .*nope"):
        model_without_weights(read_config(str(folder)))
    assert main(["check", str(folder)]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert isinstance(read_config(str(folder)), LlamaConfig)
