"""Every example does what examples/README.md says of it, on a tiny model."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys

import pytest

import hf_attn_plugins as hap
from tests.docs.blocks import ROOT
from tests.eval.tiny import model_folder

EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model") / "tiny")


def example(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_names_every_example():
    page = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    for path in sorted(EXAMPLES.iterdir()):
        assert path.name in page or path.name in ("README.md", "__pycache__"), path.name


def test_the_trainer_trains_with_the_plugin(folder, tmp_path, capsys):
    words = ["--model", str(folder), "--length", "64", "--steps", "2", "--out", str(tmp_path / "out")]
    losses = example("finetune_with_trainer").main(words)
    assert len(losses) == 2 and all(loss > 0 for loss in losses)
    assert "tiled" in capsys.readouterr().out, "the trace says what ran"
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_questions_are_answered_from_one_encoding_and_again_from_disk(folder, tmp_path, capsys):
    words = ["When?", "Who?", "--model", str(folder), "--cache", str(tmp_path / "cache"), "--max-new-tokens", "3"]
    first = example("questions").main(words)
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    assert len(first) == 2 and files
    assert example("questions").main(words) == first
    assert files == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.safetensors")}
    assert "tokens encoded or read" in capsys.readouterr().out


def test_several_devices_in_one_process_continues_as_the_plain_model_does(folder):
    words = ["--model", str(folder), "--length", "96", "--max-new-tokens", "4"]
    star = example("several_devices").main(words)
    assert star == example("several_devices").main([*words, "--attn", "tiled_attention"])  # one block: dense


@pytest.mark.slow
@pytest.mark.multi_process
def test_several_devices_over_two_processes(folder):
    words = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    words += ["--mixed_precision", "no", "--dynamo_backend", "no", str(EXAMPLES / "several_devices.py")]
    words += ["--model", str(folder), "--length", "1200", "--max-new-tokens", "4"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rank 0 of 2" in done.stdout and "rank 1 of 2" in done.stdout


def test_the_quality_gate_opens_and_closes(folder, monkeypatch):
    monkeypatch.setenv("LENGTH", "300")
    gate = importlib.util.spec_from_file_location("gate", EXAMPLES / "quality_gate" / "test_attention_quality.py")
    module = importlib.util.module_from_spec(gate)
    gate.loader.exec_module(module)
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="bfloat16")
    ids = module.tokens_for(model)
    assert ids.shape == (1, 300)
    module.test_the_plugin_takes_effect(model)
    module.test_predictions_stay(model, ids, "tiled_attention", {}, 0.01, 0.9)
    with pytest.raises(AssertionError, match=r"star_attention: KL .*what ran: star"):
        module.test_predictions_stay(model, ids, "star_attention", {"block_size": 16}, 0.0, 1.0)


def test_the_lm_eval_task_is_whole():
    rows = [json.loads(line) for line in (EXAMPLES / "lm_eval" / "facts.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 20 and all(0 <= row["answer"] < len(row["choices"]) for row in rows)


@pytest.mark.slow
def test_lm_eval_runs_as_its_page_says(folder, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    page = (EXAMPLES / "lm_eval" / "README.md").read_text(encoding="utf-8")
    command = re.search(r"^hf-attn (run -- lm_eval.*?\S)\n```$", page, re.MULTILINE | re.DOTALL)[1].replace("\\\n", " ")
    words = command.replace("$MODEL", str(folder)).replace("run -- lm_eval", "run -- -m lm_eval").split()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    words += ["--output_path", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "hf_attn_plugins.cli", *words], capture_output=True, text=True, cwd=EXAMPLES / "lm_eval"
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text(encoding="utf-8"))
    assert results["n-samples"]["facts"]["effective"] == 20


def test_the_examples_name_plugins_that_exist():
    for path in EXAMPLES.rglob("*.py"):
        for name in re.findall(r"\b\w+_attention\b(?=\")", path.read_text(encoding="utf-8")):
            assert name in hap.PLUGINS, f"{path.name}: {name}"
