"""`hf-attn report`: one run written again, several joined, and runs that do not ask the same refused."""

from __future__ import annotations

import json

import pytest
from hf_attn_plugins.eval.report import leaderboard

from hf_attn_plugins.cli import main

from . import fabricated

SMALL = dict(tasks=["vt", "niah_single_1"], lengths=[1024], count=4)


@pytest.fixture
def runs(tmp_path):
    other = ["sdpa", "star_attention:block_size=1024"]
    return fabricated.full(tmp_path / "A", **SMALL), fabricated.full(tmp_path / "B", **SMALL, labels=other)


def change(run, **config):
    found = json.loads((run / "config.json").read_text(encoding="utf-8"))
    (run / "config.json").write_text(json.dumps({**found, **config}), encoding="utf-8")


def test_one_run_is_written_again(runs, capsys):
    assert main(["report", str(runs[0])]) == 0
    said = capsys.readouterr().out
    assert "tiled_attention" in said and "report.html" in said
    written = {"metrics.json", "report.md", "report.html"}
    assert written < {path.name for path in runs[0].iterdir()} and not list(runs[0].glob(".*"))
    assert json.loads((runs[0] / "metrics.json").read_text(encoding="utf-8"))["baseline"] == "sdpa"


def test_runs_are_joined_best_first(runs, capsys):
    assert main(["report", *map(str, runs)]) == 0
    folder = runs[0].parent
    text = (folder / "leaderboard.md").read_text(encoding="utf-8")
    table = [
        line.split("|")[1].strip()
        for line in text.split("## Overview")[1].split("##")[0].splitlines()
        if "%" not in line and line.startswith("| ")
    ]
    assert sorted(table) == sorted(
        [f"{label} (A)" for label in fabricated.ATTENTIONS] + ["sdpa (B)", "star_attention:block_size=1024 (B)"]
    )
    assert "- hardware: a processor" in text and "- command" not in text and "- date" not in text
    _, metrics = leaderboard.join([leaderboard.read(run) for run in runs])
    scores = [row["score"] for row in metrics["overall"]]
    assert scores == sorted(scores, reverse=True) and table == [row["attn"] for row in metrics["overall"]]
    page = (folder / "leaderboard.html").read_text(encoding="utf-8")
    assert 'id="scores"' in page and 'id="samples"' not in page and 'class="warning"' not in page
    assert not (runs[1] / "report.html").exists(), "joining leaves the runs alone"


@pytest.mark.parametrize(
    ("config", "named"), [({"model": "other"}, "model (A: tiny-model; B: other)"), ({"tasks": ["vt"]}, "tasks (A: ")]
)
def test_unlike_runs_are_refused_unless_it_is_said(runs, capsys, config, named):
    change(runs[1], **config)
    assert main(["report", *map(str, runs)]) == 2
    said = capsys.readouterr().err
    assert named in said and said.count("\n") == 1 and "--allow-different" in said
    assert not list(runs[0].parent.glob("leaderboard*")), "nothing half-written"
    assert main(["report", *map(str, runs), "--allow-different", "--out", str(runs[0].parent / "joined")]) == 0
    for name in ("leaderboard.md", "leaderboard.html"):
        assert "cannot be ranked" in (runs[0].parent / "joined" / name).read_text(encoding="utf-8")


def test_other_prompts_under_the_same_names_are_noticed(runs):
    lines = (runs[1] / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    (runs[1] / "samples.jsonl").write_text(
        "\n".join([lines[0].replace('"d0"', '"e0"'), *lines[1:]]) + "\n", encoding="utf-8"
    )
    (found,) = leaderboard.differences([leaderboard.read(run) for run in runs])
    assert found.startswith("the prompts of 1 samples, such as ruler/")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing"], "is no folder of an evaluation: config.json is missing"),
        (["A", "--out", "x"], "are for several runs"),
        (["A", "A"], "two runs have the same name"),
        (["A", "missing"], "is no folder of an evaluation"),
    ],
)
def test_bad_input_is_one_line_and_status_2(runs, capsys, monkeypatch, arguments, said):
    monkeypatch.chdir(runs[0].parent)
    assert main(["report", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
