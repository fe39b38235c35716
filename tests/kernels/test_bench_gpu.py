"""`hf-attn bench gpu`: its plumbing on the CPU with tiny shapes, and the real thing on a GPU."""

from __future__ import annotations

import argparse
import json
import time

import pytest
import torch

from hf_attn_plugins.bench import gpu_timing
from hf_attn_plugins.commands.bench import arguments
from hf_attn_plugins.commands.bench.gpu import cases as gpu_cases
from hf_attn_plugins.commands.bench.gpu import checks as gpu_checks
from hf_attn_plugins.commands.bench.gpu import command as bench_gpu
from hf_attn_plugins.commands.bench.gpu import tune as gpu_tune
from hf_attn_plugins.commands.bench.gpu.cases import Case
from hf_attn_plugins.kernels import measured
from hf_attn_plugins.kernels.triton.tuning import HALF, Config, configuration, nearest
from tests.kernels.triton_cases import needs_interpreter

CPU = torch.device("cpu")


def parse(*words):
    parser = argparse.ArgumentParser()
    arguments.gpu(parser)
    return parser.parse_args([str(word) for word in words])


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so(tmp_path):
    with pytest.raises(ValueError, match="no CUDA or ROCm"):
        bench_gpu.run(parse("--out", tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--lengths", 0), "at least 1"),
        (("--head-dims", 64, 0), "at least 1"),
        (("--repeats", 0), "at least 1"),
        (("--minutes", 0), "more than 0"),
        (("--minutes", "nan"), "more than 0"),
    ],
)
def test_bad_arguments_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        bench_gpu.run(parse(*words), CPU)


def test_flops_by_hand():
    assert Case("forward", 32768, 128, False).flops() == 4 * 16 * 32768**2 * 128
    assert Case("forward", 8192, 64, True).flops() == 2 * 32 * 8192**2 * 64 * 2
    assert Case("backward", 32768, 128, True).flops() == 3.5 * Case("forward", 32768, 128, True).flops()
    assert Case("decode", 1024, 128, True).flops() == 4 * 32 * 1024 * 128


def test_the_share_of_a_plan_by_hand():
    """64 tokens in blocks of 8, anchor 2, query 8: pairs of the first block, six with 2 * 8 more, and the query's."""
    triangle = 8 * 9 // 2
    expected = triangle + 6 * (triangle + 16) + 8 * 56 + triangle
    assert gpu_cases.Case("plan", 64, 16, True).share() == pytest.approx(expected / (64 * 65 / 2))


def test_cases_come_in_order_of_interest_and_once():
    listed = gpu_cases.cases([1024, 4096, 131072], [64, 128])
    assert len(listed) == len(set(listed)) == 25
    assert listed[0] == Case("forward", 4096, 128, True)


def test_steps_come_in_order_of_worth_and_have_names_of_their_own():
    names = [step.name for step in bench_gpu.steps(parse(), torch.device("cuda"))]
    assert len(set(names)) == len(names)
    kinds = [
        "check: causal, bfloat16, default",
        "check: star's plan, bfloat16, flex",
        "check: causal, bfloat16, triton",
    ]
    kinds += ["time: forward, 4096", "time: plan", "time: decode, 4096"]
    kinds += ["time: backward, 4096", "check: causal, float32, triton"]
    places = [next(i for i, name in enumerate(names) if name.startswith(kind)) for kind in kinds]
    assert places == sorted(places)
    every = [name for name in names if name.startswith("check") and "bfloat16, triton" in name]
    assert len(every) == len(gpu_checks.FEATURES) and names.index(every[-1]) < places[3]


@needs_interpreter
@pytest.mark.parametrize("name", ["decode", pytest.param("causal", marks=pytest.mark.grid)])
def test_a_check_is_right_in_the_interpreter_and_notices_a_wrong_kernel(monkeypatch, name):
    found = gpu_checks.check(name, torch.float32, "triton", CPU, 20, (2, 1))
    assert set(found["errors"]) == {"out", "dq", "dk", "dv"} and found["errors"]["out"][0] < 1e-4
    plain = gpu_checks.attend
    monkeypatch.setattr(gpu_checks, "attend", lambda *a, **k: plain(*a, **k)._replace(out=plain(*a, **k).out * 1.05))
    wrong = gpu_checks.check(name, torch.float32, "triton", CPU, 20, (2, 1))
    assert not wrong["right"] and gpu_checks.as_line(name, wrong).startswith(f"WRONG: {name}: out ")


@pytest.mark.parametrize("name", gpu_checks.FEATURES)
def test_every_feature_can_be_checked(name):
    """By the tiles of the CPU: the masks, shapes and the oracle are those of a GPU."""
    found = gpu_checks.check(name, torch.float32, "cpu_tiled", CPU, 60, (2, 1))
    assert found["errors"]["out"][0] < 1e-4


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(gpu_cases, "HIDDEN", 16)
    monkeypatch.setattr(gpu_cases, "TOKENS", 1)
    monkeypatch.setattr(gpu_cases, "DECODE_HEADS", (2, 1))


@needs_interpreter
@pytest.mark.parametrize(
    "what", ["decode", *(pytest.param(w, marks=pytest.mark.grid) for w in ("forward", "backward"))]
)
def test_times_or_reasons(small, what):
    found = gpu_cases.time_case(Case(what, 20, 16, True), CPU, 1)
    assert {"default", "triton"} <= set(found["ms"]) and found["tflops"] > 0
    assert "cudnn" in found["failed"]  # no cuDNN here: the reason stands where the time would


@needs_interpreter
@pytest.mark.grid
def test_plans_are_timed_beside_dense_attention(small):
    found = gpu_cases.time_case(Case("plan", 64, 16, True), CPU, 1)
    assert set(found["ms"]) == {"dense", "default", "flash", "flex", "triton"}
    assert 0 < found["share"] < 1 and found["follows"] > 0


# The run as a whole, with steps that take no time.

RIGHT = {"right": True, "errors": {which: [1e-3, 2e-3] for which in ("out", "dq", "dk", "dv")}}
OURS_IS_RIGHT = "check: causal, bfloat16, triton"
TIMED = Case("forward", 4096, 128, True)


def timing(case=TIMED, **ms):
    return {"case": list(case), "ms": ms, "failed": {"cudnn": "RuntimeError: no"}, "tflops": 100.0}


@pytest.fixture
def steps(monkeypatch, tmp_path):
    """Steps of the run, a list to fill with (name, result, exception or function)."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    measured.forget()
    listed: list = []
    ran: list[str] = []

    def step(name, result):
        def run():
            ran.append(name)
            if callable(result):
                return result()
            if isinstance(result, BaseException):
                raise result
            return result

        return bench_gpu.Step(name, run)

    monkeypatch.setattr(bench_gpu, "steps", lambda *given: [step(*each) for each in listed])
    yield listed, ran
    measured.forget()


def whole(folder):
    return json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


def test_a_run_writes_one_file_and_one_page(steps, tmp_path):
    listed, _ = steps
    plan = Case("plan", 32768, 128, True)
    listed += [
        (OURS_IS_RIGHT, RIGHT), ("peak", {"tflops": 400.0}),
        (f"time: {TIMED.name}", timing(default=2.0, flash=1.0, triton=4.0)),
        (f"time: {plan.name}", timing(plan, dense=4.0, flash=2.0) | {"share": 0.4, "follows": 1.25}),
        ("ranks: context_parallel", {"tiled_attention": {"ms": 3.0}}),
    ]  # fmt: skip
    assert bench_gpu.run(parse("--out", tmp_path), CPU) == 0
    stored, page = whole(tmp_path)
    assert list(stored["steps"]) == [name for name, _ in listed] and stored["begun"] is None and not stored["left"]
    for words in ("400 TFLOP/s", "| causal, bfloat16, triton | right |", "best SDPA / triton", "| 0.25 |", "follows",
                  "1.25", "context_parallel", "cudnn: RuntimeError: no"):  # fmt: skip
        assert words in page, words
    assert not measured.has_rows()


def test_a_step_that_fails_leaves_the_others(steps, tmp_path, capsys):
    listed, ran = steps
    listed += [(OURS_IS_RIGHT, ValueError("no such\nkernel")), ("peak", {"tflops": 1.0})]
    assert bench_gpu.run(parse("--out", tmp_path), CPU) == 1
    stored, page = whole(tmp_path)
    assert ran == [OURS_IS_RIGHT, "peak"] and stored["steps"][OURS_IS_RIGHT]["error"] == "ValueError: no such kernel"
    assert "could not run" in page and "no such kernel" in page and "FAILED" in capsys.readouterr().out


def test_a_run_out_of_time_names_what_is_left_and_goes_on_later(steps, tmp_path, monkeypatch):
    listed, ran = steps
    now = [0.0]
    monkeypatch.setattr(bench_gpu.time, "monotonic", lambda: now[0])

    def slow():
        now[0] += 61
        return RIGHT

    listed += [("check: a, triton", slow), ("check: b, triton", slow), ("peak", {"tflops": 1.0})]
    assert bench_gpu.run(parse("--out", tmp_path, "--minutes", 1), CPU) == 0
    stored, page = whole(tmp_path)
    assert ran == ["check: a, triton"] and stored["left"] == ["check: b, triton", "peak"]
    assert "No time was left" in page and "* peak" in page
    assert bench_gpu.run(parse("--out", tmp_path, "--minutes", 5), CPU) == 0
    stored, page = whole(tmp_path)
    assert ran == ["check: a, triton", "check: b, triton", "peak"] and stored["left"] == [] and "No time" not in page


class Killed(BaseException):
    """What ends a process without a word."""


@pytest.mark.parametrize("end", [KeyboardInterrupt, Killed])
def test_an_interruption_leaves_what_there_is_and_the_next_run_goes_on(steps, tmp_path, capsys, end):
    listed, ran = steps
    listed += [("check: a, triton", RIGHT), ("check: b, triton", end()), ("peak", {"tflops": 1.0})]
    with pytest.raises(end):
        bench_gpu.run(parse("--out", tmp_path), CPU)
    stored, page = whole(tmp_path)
    assert list(stored["steps"]) == ["check: a, triton"] and "a, triton" in page
    listed[1] = ("check: b, triton", RIGHT)
    blamed = end is Killed  # what may have killed the process is not run again
    assert bench_gpu.run(parse("--out", tmp_path), CPU) == int(blamed)
    assert f"holds {1 + blamed} steps of an earlier run" in capsys.readouterr().out
    stored, _ = whole(tmp_path)
    assert ran == ["check: a, triton", "check: b, triton", *([] if blamed else ["check: b, triton"]), "peak"]
    died = {"error": "the process ended during this step"}
    assert stored["steps"]["check: b, triton"] == (died if blamed else RIGHT)


@pytest.mark.parametrize("change", ["anew", "settings", "hardware", "damaged"])
def test_another_run_begins_again(steps, tmp_path, monkeypatch, change):
    listed, ran = steps
    listed += [("peak", {"tflops": 1.0})]
    bench_gpu.run(parse("--out", tmp_path), CPU)
    words = {"anew": ["--anew"], "settings": ["--repeats", "3"]}.get(change, [])
    if change == "hardware":
        monkeypatch.setattr(bench_gpu, "facts_of", lambda device: {"processor": "another GPU"})
    if change == "damaged":
        (tmp_path / "gpu.json").write_text("{")
    bench_gpu.run(parse("--out", tmp_path, *words), CPU)
    assert ran == ["peak", "peak"]


def test_a_gpu_that_is_unusable_ends_the_run(steps, tmp_path, monkeypatch, capsys):
    listed, ran = steps
    listed += [("check: a, triton", RuntimeError("illegal memory access")), ("check: b, triton", RIGHT), ("peak", {})]
    monkeypatch.setattr(bench_gpu, "usable", lambda device: False)
    assert bench_gpu.run(parse("--out", tmp_path), CPU) == 1
    assert ran == ["check: a, triton"] and whole(tmp_path)[0]["left"] == ["check: b, triton", "peak"]
    assert "run the command again" in capsys.readouterr().out


def test_saved_timings_are_rows_for_this_kind_of_gpu(steps, tmp_path):
    listed, _ = steps
    full = Case("forward", 4096, 128, False)
    listed += [
        (OURS_IS_RIGHT, RIGHT),
        (f"time: {TIMED.name}", timing(default=2.0, flash=1.0, triton=4.0, flash_attn=0.5)),
        (f"time: {full.name}", timing(full, flash=1.0)),
    ]
    bench_gpu.run(parse("--out", tmp_path, "--save"), CPU)
    (row,) = measured.of_user()
    assert row == measured.Row(
        bench_gpu.facts_of(CPU)["processor"], measured.versions(), "bfloat16", 128, "forward", 4096,
        {"flash": 1.0, "triton": 4.0},
    )  # fmt: skip


@pytest.mark.parametrize("check", [RIGHT | {"right": False}, ValueError("no"), None], ids=["wrong", "failed", "none"])
@pytest.mark.parametrize("kernel", ["triton", "flex"])
def test_kernels_that_are_wrong_are_never_saved(steps, tmp_path, check, kernel):
    listed, _ = steps
    listed += [] if check is None else [(f"check: causal, bfloat16, {kernel}", check)]
    listed += [(f"time: {TIMED.name}", timing(**{"flash": 2.0, kernel: 1.0}))]
    assert bench_gpu.run(parse("--out", tmp_path, "--save"), CPU) == (0 if check is None else 1)
    assert [row.ms for row in measured.of_user()] == [{"flash": 2.0}]


@pytest.mark.slow
@pytest.mark.multi_process
def test_ranks_are_rehearsed_on_the_cpu(monkeypatch):
    small = {"length": 256, "heads": 2, "kv_heads": 1, "head_dim": 16, "layers": 1, "dtype": "float32"}
    monkeypatch.setattr(bench_gpu, "RANK_CASE", small)
    monkeypatch.setattr(
        bench_gpu, "METHODS", {"tiled_attention": {}, "cqs_attention": {}, "star_attention": {"block_size": 64}}
    )
    found = bench_gpu.on_ranks(CPU, 2)
    assert set(found) == set(bench_gpu.METHODS)
    for name, one in found.items():
        assert one["ranks"] == 2 and one["backend"] == "gloo" and one["ms"] > 0
        assert one["difference"] < 1e-4 * max(1, one["largest_logit"]), name
        assert 0 < one["gradient_difference"] < 1e-4 * one["largest_gradient"], name


def test_medians_are_of_calls_with_inputs_in_turn():
    seen: list[int] = []
    found, failed = gpu_timing.medians_ms({"ok": seen.append, "bad": lambda x: [][x]}, [(0,), (1,)], CPU, 4)
    assert seen == [0, 1, 0, 0, 1, 0, 1] and found["ok"] >= 0 and "IndexError" in failed["bad"]
    assert gpu_timing.matrix_peak(CPU, size=64, repeats=2) > 0


@needs_interpreter
def test_tuned_files_take_precedence(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_tune, "HIDDEN", 16)
    monkeypatch.setattr(gpu_tune, "KINDS", ("decode", "dq"))
    monkeypatch.setattr(gpu_tune, "candidates", lambda kind, head_dim: iter([Config(16, 32, 1, 1)]))
    best = gpu_tune.tune(tmp_path / "tuned.json", CPU, [16], time.monotonic() + 500, length=20)
    assert len(best) == 4 and set(best.values()) <= {Config(16, 16, 1, 1), Config(16, 32, 1, 1)}
    rows = {"sm90/forward/bfloat16/64/causal": [64, 32, 4, 1]}
    (tmp_path / "mine.json").write_text(json.dumps({"configurations": rows}))
    monkeypatch.setenv("HF_ATTN_PLUGINS_TUNING", str(tmp_path / "mine.json"))
    assert configuration("sm90", "forward", torch.bfloat16, 48, True) == Config(64, 32, 4, 1)
    assert configuration("sm90", "forward", torch.bfloat16, 48, False) == HALF["forward"][64]["sm90"]


@pytest.mark.parametrize(
    ("arch", "row"),
    [("sm80", "sm80"), ("sm86", "sm86"), ("sm89", "sm86"), ("sm90", "sm90"), ("sm100", "sm100"), ("sm103", "sm100"),
     ("sm120", "sm86"), ("gfx90a", "gfx942"), ("gfx950", "gfx942")],
)  # fmt: skip
def test_unknown_architectures_take_the_nearest_row(arch, row):
    assert nearest(arch) == row


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kernel", ["triton", None])
@pytest.mark.parametrize("name", gpu_checks.FEATURES)
def test_checks_on_the_gpu(name, kernel, dtype):
    found = gpu_checks.check(name, dtype, kernel, torch.device("cuda"))
    assert found["right"], gpu_checks.as_line(name, found)


@pytest.mark.gpu
def test_every_contender_is_timed_on_the_gpu():
    found = gpu_cases.time_case(Case("backward", 2048, 64, True), torch.device("cuda"), 3)
    assert {"triton", "flash", "flex", "default"} <= set(found["ms"]), found["failed"]
