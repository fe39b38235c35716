"""The recipes on SmolLM2-135M, a real checkpoint with a tokenizer."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import pytest
import torch
from hf_attn_plugins.patches import command
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_attn_plugins import register
from hf_attn_plugins.checkpoint.attach import ATTRIBUTE
from hf_attn_plugins.hf.inputs import load as models

pytestmark = pytest.mark.slow
register()


def patch(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(a) for a in arguments]))


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def smollm2() -> Path:
    try:
        return models.demo_folder()
    except ImportError as error:
        pytest.skip(str(error))


def continuation(folder: Path) -> str:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    ids = tokenizer("The capital of France is", return_tensors="pt")
    return tokenizer.decode(model.generate(**ids, max_new_tokens=24, do_sample=False)[0])


def test_first_layer_gives_the_same_tokens_and_does_not_pay(smollm2, tmp_path, capsys):
    before, target = digests(smollm2), tmp_path / "patched"
    patch("first-layer", smollm2, target)
    printed = capsys.readouterr().out
    assert "adds 94.4 MB to 269.0 MB" in printed and "hardly pays" in printed
    assert "verified on 128 real tokens" in printed
    assert getattr(AutoModelForCausalLM.from_pretrained(target, dtype="auto"), ATTRIBUTE, None) is not None
    assert continuation(target) == continuation(smollm2)
    patch("--undo", target)
    assert digests(target) == before == digests(smollm2)


def test_set_attention_selects_the_plugin(smollm2, tmp_path):
    before, target = digests(smollm2), tmp_path / "patched"
    patch("set-attention", smollm2, target, "--attn", "tiled_attention")
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    plain = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, attn_implementation="sdpa").eval()
    assert model.config._attn_implementation == "tiled_attention"
    ids = torch.arange(100, 200).unsqueeze(0)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-3, atol=1e-3)
    patch("--undo", target)
    assert digests(target) == before == digests(smollm2)


def test_rope_freeze_has_nothing_to_freeze(smollm2, tmp_path):
    with pytest.raises(ValueError, match="nothing changes with length"):
        patch("rope-freeze", smollm2, tmp_path / "patched", "--max-length", "4096")
    assert not list(tmp_path.iterdir())
