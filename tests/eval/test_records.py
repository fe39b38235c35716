"""The run folder: what is written can be read again, torn lines are dropped, parts of several processes are merged."""

from __future__ import annotations

import json

import pytest
from hf_attn_plugins.eval.records import Agreement, Appender, Generation, Loss, RunFolder, Sample, Speed, read_lines
from hypothesis import given, settings
from hypothesis import strategies as st

KINDS = (
    Generation("a/b/1/0000", "sdpa", prediction="grün\n", token_ids=[1, 2], score=0.5, seconds={"prefill": 0.1}),
    Loss("a/b/1/0001", "sdpa", nll_sum=1.5, count=3, buckets=[{"begin": 0, "end": 3, "nll_sum": 1.5, "count": 3}]),
    Agreement("a/b/1/0002", "star", positions=3, kl={"mean": 0.1}, top1=1.0, rms_dp=0.0, log_ppl_ratio=0.2),
    Speed("a/b/1/0003", "star", length=7, round=2, seconds={"prefill": 1.0}, peak_bytes=10),
    Generation("a/b/1/0004", "sdpa", error="ValueError: no"),
)


def test_every_kind_comes_back_as_it_was_written(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.appender("predictions") as file:
        for record in KINDS:
            file.append(record)
    assert list(folder.predictions().values()) == list(KINDS)
    lines = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["kind"] for line in lines] == ["generation", "loss", "agreement", "speed", "generation"]
    assert lines[0]["prediction"] == "grün\n" and lines[4]["error"] == "ValueError: no"


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 400), st.binary(max_size=3))
def test_a_file_cut_anywhere_loses_at_most_its_last_line_and_can_be_continued(tmp_path_factory, cut, rubbish):
    path = tmp_path_factory.mktemp("cut") / "predictions.jsonl"
    samples = [Sample(f"s/t/1/{i:04d}", "t", "s", 1, 1) for i in range(3)]
    with Appender(path) as file:
        for sample in samples:
            file.append(sample)
    data = path.read_bytes()
    cut = min(cut, len(data))
    path.write_bytes(data[:cut] + rubbish.replace(b"\n", b""))
    whole = data[:cut].count(b"\n")
    assert len(list(read_lines(path))) == whole
    with Appender(path) as file:
        file.append(Sample("s/t/1/9999", "t", "s", 1, 1))
    found = [line["sample"] for line in read_lines(path)]
    assert found == [s.sample for s in samples[:whole]] + ["s/t/1/9999"]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text('{"a": 1}\n{"b"\n{"c": 1}\n', encoding="utf-8")
    with pytest.raises(ValueError, match=r"predictions\.jsonl, line 2"):
        list(read_lines(path))


def test_parts_of_several_processes_are_merged_and_the_later_line_counts(tmp_path):
    folder = RunFolder(tmp_path)
    for process in (0, 1, 10):
        with folder.appender("predictions", process) as file:
            file.append(Generation(f"s/t/1/{process:04d}", "sdpa", score=0.0))
    with folder.appender("predictions", 1) as file:
        file.append(Generation("s/t/1/0001", "sdpa", score=1.0))
    (tmp_path / "predictions-notes.jsonl").write_text("not ours", encoding="utf-8")
    found = folder.predictions()
    assert [name for name, _ in found] == ["s/t/1/0000", "s/t/1/0001", "s/t/1/0010"]
    assert found["s/t/1/0001", "sdpa"].score == 1.0


def test_a_file_is_replaced_as_a_whole(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_json("config", {"a": 1})
    with pytest.raises(TypeError):
        folder.write_json("config", {"a": object()})
    assert folder.read_json("config") == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.parametrize(("text", "message"), [(None, "config.json is missing"), ("[1]", "no JSON object"), ("{", "{")])
def test_a_folder_that_is_no_run_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json" if message == "{" else message):
        RunFolder(tmp_path).read_json("config")
