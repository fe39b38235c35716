"""`hf-attn run -- lm_eval ...` needs no code of ours: the plugin's name reaches Transformers, on local data."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.eval.tiny import jsonl, model_folder

TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs:
  data_files: {{test: {data}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_lm_eval_runs_a_plugin_by_name(tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    model = model_folder(tmp_path / "model")
    data = jsonl(tmp_path / "data.jsonl", [{"question": f"Is {n} even?", "answer": n % 2} for n in range(3)])
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "tiny.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = f"pretrained={model},attn_implementation=star_attention,dtype=float32"
    words = ["--model", "hf", "--model_args", arguments, "--tasks", "tiny_choice", "--device", "cpu"]
    words += ["--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out"), "--batch_size", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "hf_attn_plugins.cli", "run", "--", "-m", "lm_eval", *words],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(next((tmp_path / "out").rglob("results*.json")).read_text(encoding="utf-8"))
    assert 0 <= results["results"]["tiny_choice"]["acc,none"] <= 1
    assert results["n-samples"]["tiny_choice"]["effective"] == 3
