"""`hf-attn bench indexed` on small sizes: what it prints is what it measured."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

from hf_attn_plugins.commands.bench import arguments as declared
from hf_attn_plugins.commands.bench.indexed import command as command
from hf_attn_plugins.commands.bench.indexed import demo
from hf_attn_plugins.commands.bench.indexed import timing as bench


def run(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    declared.indexed(parser)
    command.run(parser.parse_args(arguments))


SMALL = ["--words", "6", "--length", "5", "--characters", "9", "--width", "8", "--repeats", "1"]


def test_every_stage_computes_the_same_both_ways():
    timings = bench.time_stages(bench.CallSizes(6, 5, 9, 8), repeats=1)
    assert len(timings) == 7
    for timing in timings:
        assert timing.error < 1e-5 and timing.direct > 0 and timing.tables > 0
        assert timing.ratio == timing.direct / timing.tables


def test_all_parts_are_printed_and_written(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "SWEEPS", {"words": (1, 3)})
    text = tmp_path / "text.txt"
    text.write_text("the quick brown foxes jumped over twelve lazy sleeping dogs beside another river")
    run(*SMALL, "--steps", "2", "--text", str(text), "--query", "foxs", "--output", str(tmp_path))
    printed = capsys.readouterr().out
    assert (tmp_path / "indexed.md").read_text() == printed
    found = json.loads((tmp_path / "indexed.json").read_text())
    assert [row["value"] for row in found["scaling"]] == [1, 3]
    assert found["machine"]["torch"] == torch.__version__
    for row in found["stages"]:
        assert f"| {row['name']} | {1e3 * row['direct']:.2f} |" in printed
    assert found["text"]["distinct"] == 13 and "text.txt" in printed
    assert found["text"]["error"] < 1e-4 and "foxes" in found["text"]["neighbours"]["foxs"][0]


def test_parts_measured_apart_are_kept_together(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SWEEPS", {"words": (1, 3)})
    run(*SMALL, "--only", "stages", "--output", str(tmp_path))
    stages = json.loads((tmp_path / "indexed.json").read_text())["stages"]
    run(*SMALL, "--only", "scaling", "--output", str(tmp_path))
    found = json.loads((tmp_path / "indexed.json").read_text())
    assert found["stages"] == stages and len(found["scaling"]) == 2
    assert found["repeats"] == {"stages": 1, "scaling": 1}
    assert "## Stages" in capsys.readouterr().out.rpartition("# Indexed attention")[2]
    monkeypatch.setattr(bench, "machine", lambda: {**found["machine"], "torch": "another"})
    run(*SMALL, "--only", "scaling", "--output", str(tmp_path))
    assert "stages" not in json.loads((tmp_path / "indexed.json").read_text())


def test_training_brings_misspellings_closer():
    words = [a + b + c for a in ("cat", "dog", "sun", "tree") for b in ("light", "house", "water") for c in ("s", "ed")]
    torch.manual_seed(0)
    vocabulary = demo.Vocabulary(length=12)
    encoder = demo.WordEncoder(vocabulary.size, 12, 16, 2, combiner="concatenate", form="tables")
    losses = demo.train(encoder, vocabulary, words, steps=40, batch=24)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_nearest_is_by_cosine():
    vectors = torch.tensor([[1.0, 0.0], [10.0, 10.0], [0.0, 0.1]])
    scores, rows = demo.nearest(vectors, torch.tensor([[0.0, 5.0]]), 2)
    assert rows.tolist() == [[2, 1]]
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.5**0.5]]))


def test_the_default_text_is_long_and_english():
    text, name = demo.read_text(None)
    assert len(text) > 100_000 and "attribute" in text and "pydoc_data" in name


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--repeats", "0"], ValueError, "--repeats 0"),
        (["--words", "-1", "--only", "stages"], ValueError, "words=-1"),
        (["--only", "text", "--text", "nowhere.txt"], FileNotFoundError, "nowhere.txt"),
        (["--output", "nowhere"], FileNotFoundError, "nowhere"),
    ],
)
def test_user_errors_say_what_is_wrong(arguments, error, message):
    with pytest.raises(error, match=message):
        run(*arguments)


def test_a_text_without_words_and_a_binary_file_are_refused(tmp_path):
    (tmp_path / "few").write_text("two words")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="2 distinct words"):
        run("--only", "text", "--text", str(tmp_path / "few"))
    with pytest.raises(ValueError, match="not UTF-8"):
        run("--only", "text", "--text", str(tmp_path / "binary"))
