"""`hf-attn plan cqs`: the paper's demonstration, its summary, pictures, JSON and costs."""

import argparse
import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hf_attn_plugins import cqs
from hf_attn_plugins.cqs import command
from hf_attn_plugins.cqs.show import text as show
from hf_attn_plugins.cqs.show.demo import demonstrate, memory_summary
from hf_attn_plugins.cqs.show.draw import draw, partition
from tests.steps import steps

PAPER = ["--length", "11", "--workers", "7", "--interest-set", "0,1,5"]


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(arguments))
    return capsys.readouterr().out


def test_the_seeds_demonstration(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, *PAPER, "--steps")
    squeezed = "".join(text.split())
    for line in Path(__file__).with_name("paper_lists.txt").read_text().splitlines():
        assert "".join(line.split()) in squeezed
    assert [line for line in text.splitlines() if line.startswith("====")] == [
        "==== Scheduler =====", "===== Workers =====", "===== Tiler =====",
    ]  # fmt: skip
    assert [line.split(",")[0] for line in text.splitlines() if line.startswith("Worker ")] == [
        f"Worker {w}: mTki = {length}" for w, length in enumerate((4, 4, 4, 5, 5, 6, 5))
    ]
    assert "CQS Attention results is correct:\nTrue\n" in text
    for figure in (
        "m / W: 0.42857142857142855",
        "Longest subsequence: 6, ratio to N: 0.5454545454545454",
        "Shortest subsequence: 4, ratio to N: 0.36363636363636365",
        "Average length: 4.714285714285714, ratio to N: 0.4285714285714286",
        "Standard deviation: 0.755928946018454",
    ):
        assert figure in text


def test_the_summary_comes_first_and_fits_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, *PAPER).splitlines()
    assert len(lines) < 24 and lines[1].startswith("Approximate ratio") and "--steps" in lines[-1]
    assert not any(line.startswith("[") for line in lines), "matrices are behind --steps"
    steps = output(capsys, *PAPER, "--steps").splitlines()
    assert steps.index("==== Scheduler =====") > next(i for i, line in enumerate(steps) if "Longest" in line)


def test_workers_add_up_to_plain_softmax() -> None:
    plan = cqs.plan(11, 7, (0, 1, 5))
    demo = demonstrate(plan, seed=3)
    for worker, local in enumerate(demo.workers):
        banned = plan.local_bans(worker)
        assert (local.scores == 0).sum() == len(banned) and all(local.scores[a, b] == 0 for a, b in banned)
        assert np.allclose(local.scores.sum(1), local.sums)
    weights = np.exp(demo.query @ demo.key.T)
    assert np.allclose(weights.sum(1), demo.sums) and np.allclose(weights @ demo.value, demo.outputs)
    assert demo.is_correct()
    demo.outputs[4] += 0.01
    assert not demo.is_correct()


def test_seed_option_draws_other_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    one, same, other = (output(capsys, *PAPER, "--steps", "--seed", seed) for seed in "001")
    assert one == same != other


@pytest.mark.parametrize(
    "arguments", [["--length", "0", "--workers", "3"], ["--length", "1"], ["--length", "2", "--workers", "8"]]
)
def test_tiny_lengths(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert "correct:\nTrue" in output(capsys, *arguments, "--steps")


def test_memory_summary_of_one_worker() -> None:
    assert memory_summary(cqs.plan(9, 1))["standard_deviation"] == 0.0


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(output(capsys, *PAPER, "--json"))
    plan = cqs.plan(11, 7, (0, 1, 5))
    assert found["correct"] is True and found["summary"]["longest"] == 6
    assert found["material"] == plan.material
    assert found["local_bans"][4] == [list(pair) for pair in plan.local_bans(4)]
    large = json.loads(output(capsys, "--length", "1000000", "--workers", "31", "--budget", "8GiB", "--json"))
    assert "tasks" not in large and large["cost"]["cells"] == 10**6 * (10**6 + 1) // 2
    assert large["cost"]["tiles_moved"] < large["cost"]["moved"]


def test_costs_and_advice(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "--length", "1000000", "--workers", "31", "--budget", "8GiB")
    for words in ("bytes moved", "peak", "Executed cells", "one device", "ring", "Ulysses", "prefer it on one device"):
        assert words in text
    assert "ABOVE the budget" in output(capsys, "--length", "1000000", "--workers", "7", "--budget", "1GiB")
    assert "not even one row" in output(capsys, "--length", "1000000", "--workers", "183", "--budget", "65MiB")
    assert "with 1 workers" in output(capsys, "--length", "50000", "--budget", "8GiB")
    assert "1.0000 of N^2" in output(capsys, "--length", "30011", "--workers", "7", "--full")


def test_dense_local_kernels_compute_m_squared_over_w() -> None:
    shape = command._shape(_parsed("--length", "700"))
    for workers, ratio in ((7, 9 / 7), (8, 2.0), (31, 36 / 31)):
        numbers = show.cost_numbers(cqs.plan(100 * workers, workers), shape, False, None, 0)
        assert numbers["cells_ratio"] == 1.0 and numbers["dense_cells_ratio"] == pytest.approx(ratio)


def _parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--length", "-1"], "length of at least 0"),
        (["--length", "9", "--workers", "0"], "at least 1 worker"),
        (["--length", "9", "--workers", "7", "--interest-set", "0,1,2"], "no difference cover"),
        (["--length", "1000000", "--budget", "1KiB"], "too small"),
        (["--length", "9", "--heads", "0"], "--heads 0"),
        (["--length", "300", "--steps"], "fewer than 30 tokens"),
    ],
)
def test_user_errors(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match=words):
        output(capsys, *arguments)


def test_ill_formed_lists_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parsed("--length", "9", "--workers", "seven")
    assert "like 0,1,5" in capsys.readouterr().err


def test_summary_of_ten_million_tokens_takes_as_many_steps_as_that_of_few(capsys: pytest.CaptureFixture[str]) -> None:
    def summary(length: int) -> str:
        return output(capsys, "--length", str(length), "--workers", "133")

    assert "Longest subsequence: 902256" in summary(10_000_000)
    assert steps(lambda: summary(10_000_000)) <= 1.1 * steps(lambda: summary(10_000)) + 1000


WITHOUT_TORCH = """
import sys, types
sys.modules["torch"] = None
package = types.ModuleType("hf_attn_plugins")  # its own __init__, which registers plugins, is not what is tested here
package.__path__ = [sys.argv[1]]
sys.modules["hf_attn_plugins"] = package
from hf_attn_plugins.cqs import command
print(command.plan(9, 7).lengths)
"""


def test_planning_needs_no_pytorch() -> None:
    package = str(Path(command.__file__).parents[1])
    run = subprocess.run([sys.executable, "-c", WITHOUT_TORCH, package], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert ast.literal_eval(run.stdout) == cqs.plan(9, 7).lengths


def test_partition_shows_every_pair_of_groups_with_its_worker() -> None:
    plan = cqs.plan(11, 7, (0, 1, 5))
    owner = partition(plan)
    for worker in range(7):
        for a, b in plan.tasks(worker):
            groups = [next(g for g, tokens in enumerate(plan.token_groups) if t in tokens) for t in (a, b)]
            assert owner[groups[0]][groups[1]] == worker


@pytest.mark.parametrize(("tokens", "workers"), [(11, 7), (3, 7), (0, 2), (1, 1), (100_000, 31)])
def test_pictures(tokens: int, workers: int, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    draw(cqs.plan(tokens, workers), tmp_path / "plan.png")
    assert (tmp_path / "plan.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_pictures_name_the_extra_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"hf-attn-plugins\[demo\]"):
        draw(cqs.plan(5, 3), tmp_path / "plan.png")


def test_bench_measures_every_case_and_keeps_earlier_ones(tmp_path: Path) -> None:
    from hf_attn_plugins.commands.bench import arguments as declared
    from hf_attn_plugins.commands.bench import cqs as bench

    def measured(*arguments: str) -> list[dict]:
        parser = argparse.ArgumentParser()
        declared.cqs(parser)
        bench.run(parser.parse_args([*arguments, "--repeats", "1", "--out", str(tmp_path)]))
        return json.loads((tmp_path / "cqs.json").read_text())["rows"]

    rows = measured("--lengths", "256", "--workers", "1", "7", "--masks", "causal")
    assert [(row["tokens"], row["workers"]) for row in rows] == [(256, 1), (256, 7)]
    rows = measured("--lengths", "200", "--workers", "8", "--masks", "full")
    assert [(row["tokens"], row["workers"]) for row in rows] == [(200, 8), (256, 1), (256, 7)]
    assert rows[0]["cells"] == 1.0 and rows[0]["dense cells"] == 2.0 and rows[0]["balance"] == pytest.approx(1.125)
    rows = measured("--lengths", "200", "--workers", "8", "--masks", "full", "--dtypes", "bfloat16")
    assert [(row["dtype"], row["tokens"]) for row in rows] == [
        ("float32", 200),
        *[("float32", 256)] * 2,
        ("bfloat16", 200),
    ]
    with pytest.raises(ValueError, match="at least 1"):
        measured("--workers", "0")
