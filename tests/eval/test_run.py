"""`hf-attn eval` on a tiny model: what it writes, how it resumes, how it fails."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hf_attn_plugins.eval import command
from hf_attn_plugins.eval.records import Appender, Generation, Prediction, RunFolder, Speed
from hf_attn_plugins.eval.running import runner
from hf_attn_plugins.eval.running.network import network

from hf_attn_plugins import cli
from tests import forks
from tests.eval.tiny import model_folder

pytest.importorskip("wonderwords")

ATTN = "sdpa,star_attention:block_size=64,anchor_size=8,query_size=16,cqs_attention:workers=3,min_length=64"
STAR = "star_attention:block_size=64,anchor_size=8,query_size=16"
CQS = "cqs_attention:workers=3,min_length=64"
SMALL = [
    *(
        "--dtype",
        "float32",
        "--attn",
        ATTN,
        "--tasks",
        "niah_single_1,niah_multikey_2,ppl,agreement,speed",
        "--lengths",
        "256,320",
    ),
    *("--samples", "2", "--text-samples", "1", "--rounds", "2", "--decode-tokens", "3", "--max-new-tokens", "5"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("model"))


def evaluate(model: Path, out: Path, *more: str) -> int:
    return cli.main(["eval", "--model", str(model), "--out", str(out), *SMALL, *more])


@pytest.fixture(scope="module")
def finished(model, tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert evaluate(model, out) == 0
    return out


def measured(folder: Path) -> dict:
    """Everything a run found out, timings and memory aside."""
    found = {}
    for key, prediction in RunFolder(folder).predictions().items():
        value = prediction.as_dict()
        value.pop("seconds", None), value.pop("peak_bytes", None)
        found[key] = value
    return found


def test_a_run_holds_every_sample_of_every_implementation(finished):
    folder = RunFolder(finished)
    samples, predictions = folder.samples(), folder.predictions()
    assert len(samples) == 2 * (2 + 2 + 1 + 1 + 2)
    for name, sample in samples.items():
        wanted = {"sdpa", STAR, CQS} - ({"sdpa"} if sample.task == "agreement" else set())
        assert {attn for s, attn in predictions if s == name} == wanted
    for (name, _), found in predictions.items():
        assert found.error is None
        if isinstance(found, Generation):
            sample = samples[name]
            assert sample.tokens + 5 == sample.length and found.prompt_tokens == sample.tokens
            assert 0 <= found.score <= 1 and 1 <= found.new_tokens <= 5 == sample.max_new_tokens
            assert set(found.seconds) == {"prefill", "first_token", "decode", "total"}
            assert len(sample.prompt_tail) <= 600 and len(sample.digest) == 64
        if isinstance(found, Speed):
            assert set(found.seconds) == {"prefill", "first_token", "decode_per_token"}
    config, environment = folder.read_json("config"), folder.read_json("environment")
    assert config["baseline"] == "sdpa" and config["lengths"] == [256, 320]
    assert config["attn"][1] == {
        "label": STAR,
        "implementation": "star_attention",
        "options": {"block_size": 64, "anchor_size": 8, "query_size": 16},
    }
    assert environment["processes"] == 1 and environment["versions"]["transformers"]
    assert "The grass" not in json.dumps(config)


def test_exact_plugins_generate_what_the_baseline_does(finished):
    found = RunFolder(finished).predictions()
    answers = [(name, p) for (name, attn), p in found.items() if attn == CQS and p.kind == "generation"]
    pairs = [(p.token_ids, found[name, "sdpa"].token_ids) for name, p in answers]
    assert len(pairs) == 8 and all(ours == theirs for ours, theirs in pairs)
    exact = [p.kl["mean"] for (_, attn), p in found.items() if p.kind == "agreement" and attn == CQS]
    approximate = [p.kl["mean"] for (_, attn), p in found.items() if p.kind == "agreement" and attn == STAR]
    assert max(exact) < 1e-8 < min(approximate)


def test_the_report_is_written_and_shown(finished, model, capsys):
    assert evaluate(model, finished) == 0  # nothing is left to ask
    out = capsys.readouterr().out
    assert "report.html" in out
    metrics = RunFolder(finished).read_json("metrics")
    assert metrics["errors"] == 0 and {row["attn"] for row in metrics["scores"]} == {"sdpa", STAR, CQS}
    assert (finished / "report.md").is_file() and (finished / "report.html").is_file()


@pytest.mark.parametrize("seed", range(3))
def test_a_run_torn_at_any_byte_is_resumed_without_loss_or_repetition(model, finished, tmp_path, seed, monkeypatch):
    """The files as an interruption leaves them: predictions cut at a byte, samples as far as they were asked."""
    draw, out = random.Random(seed), tmp_path / "torn"
    out.mkdir()
    for name in ("config.json", "environment.json"):
        (out / name).write_bytes((finished / name).read_bytes())
    done = (finished / "predictions.jsonl").read_bytes()
    torn = done[: draw.randrange(len(done))]
    whole = torn.split(b"\n")[:-1]
    (out / "predictions.jsonl").write_bytes(torn)
    asked = {json.loads(line)["sample"] for line in whole}
    lines = (finished / "samples.jsonl").read_bytes().splitlines(keepends=True)
    known = [line for line in lines if json.loads(line)["sample"] in asked]
    (out / "samples.jsonl").write_bytes(b"".join(known) + lines[len(known) % len(lines)][: draw.randrange(50)])

    appended, append = [], Appender.append
    monkeypatch.setattr(Appender, "append", lambda file, record: (appended.append(record), append(file, record)))
    assert evaluate(model, out) == 0
    again = [record for record in appended if isinstance(record, Prediction)]
    assert len(again) == done.count(b"\n") - len(whole)
    assert measured(out) == measured(finished)
    assert RunFolder(out).samples() == RunFolder(finished).samples()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_random_points_changes_nothing(model, finished, tmp_path, seed):
    kill_and_resume(model, finished, tmp_path / "killed", random.Random(seed), kills=3)


def test_kill_9_changes_nothing(model, finished, tmp_path):
    kill_and_resume(model, finished, tmp_path / "killed", random.Random(7), kills=1)


def kill_and_resume(model: Path, finished: Path, out: Path, draw: random.Random, kills: int) -> None:
    total = len(RunFolder(finished).predictions())
    command = "import sys; from hf_attn_plugins.cli import main; sys.exit(main(sys.argv[1:]))"
    words = ["eval", "--model", model, "--out", out, *SMALL]
    recorded = out / "predictions.jsonl"
    stops = sorted(draw.sample(range(1, total - 2), kills))
    for stop in stops:
        process = forks.start(command, *words, output=Path(os.devnull), errors=Path(os.devnull))
        while process.is_alive() and not (recorded.is_file() and recorded.read_bytes().count(b"\n") >= stop):
            time.sleep(0.005)
        process.kill()
        process.join()
    killed_at = recorded.read_bytes().count(b"\n")
    assert killed_at >= stops[-1]
    assert evaluate(model, out) == 0
    assert measured(out) == measured(finished)
    assert RunFolder(out).samples() == RunFolder(finished).samples()


def test_a_failing_sample_is_recorded_and_the_run_goes_on(model, tmp_path, monkeypatch, capsys):
    out, original, calls = tmp_path / "failing", runner.measure.answer, []
    words = ["--tasks", "niah_single_1", "--lengths", "256", "--attn", "sdpa,tiled_attention"]

    def failing(model, ids, *args, **kwargs):
        calls.append(len(ids))
        if len(calls) == 3:
            raise RuntimeError("no more\nmemory")
        return original(model, ids, *args, **kwargs)

    monkeypatch.setattr(runner.measure, "answer", failing)
    assert evaluate(model, out, *words) == 1
    found = RunFolder(out).predictions()
    assert [p.error for p in found.values()].count("RuntimeError: no more memory") == 1 and len(found) == 4
    assert "1 answer failed" in capsys.readouterr().err
    asked = len(calls)
    assert evaluate(model, out, *words) == 1 and len(calls) == asked  # it stays failed, and is not asked again
    assert evaluate(model, out, *words, "--retry-errors") == 0
    again = RunFolder(out).predictions()
    assert not [p for p in again.values() if p.error] and set(again) == set(found)
    assert all(again[key] == p for key, p in found.items() if not p.error)


def test_a_sample_that_cannot_be_made_fails_for_every_implementation(model, tmp_path, monkeypatch):
    from hf_attn_plugins.eval.tasks.niah import Needles

    original = Needles.item
    made = lambda self, length, index: 1 / 0 if index == 1 else original(self, length, index)  # noqa: E731
    monkeypatch.setattr(Needles, "item", made)
    out = tmp_path / "run"
    assert evaluate(model, out, "--tasks", "niah_single_1", "--lengths", "256") == 1
    found = RunFolder(out).predictions()
    assert {(name[-4:], p.error) for (name, _), p in found.items() if p.error} == {
        ("0001", "ZeroDivisionError: division by zero")
    }
    assert len(found) == 6 and RunFolder(out).samples()["ruler/niah_single_1/256/0001"].tokens == 0


BAD = [
    (["--tasks", "nothing"], "no task 'nothing'"),
    (["--attn", "sdpa,nothing"], "no attention 'nothing'"),
    (["--attn", "star_attention:block=3"], "star_attention has no option block"),
    (["--attn", "star_attention:block_size=0"], "block_size=0"),
    (["--attn", "sdpa:x=1"], "sdpa takes no options"),
    (["--attn", "sdpa,sdpa"], "each can be evaluated once"),
    (["--baseline", "eager"], "baseline='eager' is not among attn"),
    (["--lengths", "4096"], "beyond the model's 2048 positions"),
    (["--lengths", "64"], "does not fit into --lengths 64"),
    (["--lengths", "a"], "lengths='a'"),
    (["--samples", "0"], "samples=0"),
    (["--tasks", "niah_single_2"], "--haystack FILE"),
    (["--haystack", "missing.json", "--tasks", "niah_single_2"], "missing.json"),
    (["--text", "missing.txt"], "missing.txt"),
    (["--data", "longbench"], "write suite=folder"),
    (["--data", "other=x"], "data names the suite other"),
    (["--config", "missing.yaml"], "no such file"),
    (["--model", "missing/folder/x"], "no model folder"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input_is_one_line_and_nothing_is_written(model, tmp_path, capsys, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    assert evaluate(model, tmp_path / "run", *words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("hf-attn eval: ") and message in error
    assert list(tmp_path.iterdir()) == []


def test_data_that_lack_something_are_one_line_and_nothing_is_written(model, tmp_path, capsys):
    data = tmp_path / "data"
    data.mkdir()
    words = ["--tasks", "longbench/qasper", "--data", f"longbench={data}"]
    for text, message in (
        (None, "no qasper.jsonl"),
        ("", "qasper.jsonl is empty"),
        ('{"context": "c", "input": "i"}\n', "lacks the field answers"),
    ):
        if text is not None:
            (data / "qasper.jsonl").write_text(text, encoding="utf-8")
        assert evaluate(model, tmp_path / "run", *words) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("hf-attn eval: longbench") and message in error
    assert not (tmp_path / "run").exists()


def test_folders_of_other_runs_are_left_alone(model, finished, tmp_path, capsys):
    before = (finished / "config.json").read_bytes()
    assert evaluate(model, finished, "--seed", "1") == 2
    assert "seed: 42 there, 1 here" in capsys.readouterr().err
    assert (finished / "config.json").read_bytes() == before
    (tmp_path / "letters.txt").write_text("mine", encoding="utf-8")
    assert evaluate(model, tmp_path) == 2
    assert "other files" in capsys.readouterr().err and [p.name for p in tmp_path.iterdir()] == ["letters.txt"]


def test_another_prompt_under_the_same_name_is_noticed(model, finished, tmp_path, capsys):
    out = tmp_path / "changed"
    out.mkdir()
    for name in ("config.json", "environment.json"):
        (out / name).write_bytes((finished / name).read_bytes())
    lines = [json.loads(line) for line in (finished / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    lines[0]["digest"] = "0" * 64
    (out / "samples.jsonl").write_text(json.dumps(lines[0]) + "\n", encoding="utf-8")
    assert evaluate(model, out) == 2
    assert "was recorded with another prompt" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [{"chat": False}, {"bos": True}, {"chat": False, "bos": True}])
def test_models_without_template_and_tokenizers_with_bos_work(tmp_path, kind, capsys):
    other = model_folder(tmp_path / "model", **kind)
    words = ["--tasks", "niah_single_1,ppl", "--lengths", "256", "--attn", "sdpa", "--samples", "1"]
    assert evaluate(other, tmp_path / "run", *words) == 0
    sample = next(iter(RunFolder(tmp_path / "run").samples().values()))
    assert ("<|assistant|>" in sample.prompt_tail) == kind.get("chat", True) and sample.tokens == 251
    if not kind.get("chat", True):
        assert evaluate(other, tmp_path / "never", *words, "--chat", "yes") == 2
        assert "no chat template" in capsys.readouterr().err and not (tmp_path / "never").exists()


def test_the_network_stays_off_unless_asked_for(model, tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(command, "load", lambda *_: seen.update(os.environ) or 1 / 0)
    for words, expected in (([], "1"), (["--online"], None), (["--offline"], "1")):
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        seen.clear()
        with pytest.raises(ZeroDivisionError):
            evaluate(model, tmp_path / "run", *words)
        assert seen.get("HF_HUB_OFFLINE") == expected and "HF_HUB_OFFLINE" not in os.environ


def test_the_network_goes_off_in_libraries_that_were_imported_before(monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    for online in (False, True):
        with network(online):
            assert huggingface_hub.is_offline_mode() is not online
            assert datasets.config.HF_HUB_OFFLINE is not online
        assert not huggingface_hub.is_offline_mode() and not datasets.config.HF_HUB_OFFLINE


def launched(model: Path, out: Path, *more: str) -> subprocess.CompletedProcess:
    # --multi_gpu is how Accelerate is told to start several processes, on CPUs as well.
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0", "-m"]
    words = ["hf_attn_plugins.eval", "--model", str(model), "--out", str(out), "--device", "cpu", *SMALL, *more]
    threads = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-m", *launch, *words], capture_output=True, text=True, env=threads)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.mark.slow
@pytest.mark.multi_process
def test_processes_share_the_samples_and_find_what_one_finds(model, finished, tmp_path):
    out = tmp_path / "shared"
    done = launched(model, out)
    parts = [len(path.read_bytes().splitlines()) for path in out.glob("predictions*.jsonl")]
    assert len(parts) == 2 and min(parts) > 0
    assert measured(out) == measured(finished)
    assert RunFolder(out).samples() == RunFolder(finished).samples()
    assert RunFolder(out).read_json("environment")["processes"] == 2
    assert (out / "report.html").is_file() and done.stdout.count("Against sdpa") == 1


PARALLEL = ["--tasks", "niah_single_1", "--attn", "sdpa,tiled_attention", "--context-parallel"]


@pytest.mark.slow
@pytest.mark.multi_process
def test_with_context_parallelism_all_processes_answer_every_sample(model, tmp_path):
    pytest.importorskip("hf_attn_plugins.parallel")
    out = tmp_path / "together"
    launched(model, out, *PARALLEL)
    assert [path.name for path in out.glob("predictions*.jsonl")] == ["predictions.jsonl"]
    found = RunFolder(out).predictions()
    assert len(found) == 8 and not [p.error for p in found.values() if p.error]
    assert all(p.token_ids == found[name, "sdpa"].token_ids for (name, _), p in found.items())


def test_context_parallelism_is_for_tasks_that_generate(model, tmp_path, capsys):
    assert evaluate(model, tmp_path / "run", *PARALLEL, "--tasks", "ppl") == 2
    assert "leave out ppl" in capsys.readouterr().err and not (tmp_path / "run").exists()
