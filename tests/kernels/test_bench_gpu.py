"""`hf-attn bench gpu`: its plumbing on the CPU with tiny shapes, and the real thing on a GPU."""

from __future__ import annotations

import argparse
import itertools
import json
import time

import pytest
import torch

from hf_attn_plugins.bench import gpu_timing
from hf_attn_plugins.commands.bench import arguments, gpu_tune
from hf_attn_plugins.commands.bench import gpu as bench_gpu
from hf_attn_plugins.commands.bench.gpu import Case
from hf_attn_plugins.kernels.triton.tuning import HALF, Config, configuration, nearest
from tests.kernels.triton_cases import needs_interpreter

CPU = torch.device("cpu")


def parse(*words):
    parser = argparse.ArgumentParser()
    arguments.gpu(parser)
    return parser.parse_args(words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_says_so():
    with pytest.raises(ValueError, match="no CUDA or ROCm"):
        bench_gpu.run(parse())


def test_flops_by_hand():
    assert Case("forward", 32768, 128, False).flops() == 4 * 16 * 32768**2 * 128
    assert Case("forward", 8192, 64, True).flops() == 2 * 32 * 8192**2 * 64 * 2
    assert Case("backward", 32768, 128, True).flops() == 3.5 * Case("forward", 32768, 128, True).flops()
    assert Case("decode", 1024, 128, True).flops() == 4 * 32 * 1024 * 128


def test_cases_come_in_order_of_interest_and_once():
    listed = bench_gpu.cases([1024, 4096, 131072], [64, 128])
    assert len(listed) == len(set(listed)) == 24
    assert listed[0] == Case("forward", 4096, 128, True)


@needs_interpreter
def test_correctness_passes_in_the_interpreter_and_notices_a_wrong_kernel(monkeypatch):
    lines = list(itertools.islice(bench_gpu.correctness(CPU, 20, (2, 1)), 4))
    assert sum(line.startswith("right") for line in lines) >= 3, lines  # 20 tokens leave a single limit to luck
    plain = bench_gpu.attend
    monkeypatch.setattr(bench_gpu, "attend", lambda *a, **k: plain(*a, **k)._replace(out=plain(*a, **k).out * 1.05))
    assert next(bench_gpu.correctness(CPU, 20, (2, 1))).startswith("WRONG")


@needs_interpreter
def test_rows_hold_times_or_reasons(monkeypatch):
    monkeypatch.setattr(bench_gpu, "HIDDEN", 32)
    monkeypatch.setattr(bench_gpu, "TOKENS", 20)
    monkeypatch.setattr(bench_gpu, "_flex", lambda case, causal: lambda q, k, v: 1 / 0)
    rows = bench_gpu.measure(
        parse("--lengths", "20", "--head-dims", "16", "--repeats", "2"), CPU, 1.0, time.monotonic() + 500
    )
    assert [row["what"] for row in rows] == ["forward", "decode", "backward", "forward"]
    for row in rows:
        assert row["triton_ms"] > 0 and row["tflops"] > 0 and "ZeroDivisionError" in row["flex_ms"]
        assert isinstance(row["sdpa_cudnn_ms"], str)  # no cuDNN here: the reason stands where the time would
    assert bench_gpu.measure(parse("--lengths", "20"), CPU, 1.0, time.monotonic() - 1) == []


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
    [("sm80", "sm80"), ("sm86", "sm80"), ("sm89", "sm80"), ("sm90", "sm90"), ("sm100", "sm100"), ("sm103", "sm100"),
     ("sm120", "sm80"), ("gfx90a", "gfx942"), ("gfx950", "gfx942")],
)  # fmt: skip
def test_unknown_architectures_take_the_nearest_row(arch, row):
    assert nearest(arch) == row


@pytest.mark.gpu
def test_correctness_on_the_gpu():
    lines = list(bench_gpu.correctness(torch.device("cuda")))
    assert lines and all(line.startswith("right") for line in lines), "\n".join(lines)


@pytest.mark.gpu
def test_every_alternative_is_timed_on_the_gpu():
    found, failed = bench_gpu.time_case(Case("backward", 2048, 64, True), torch.device("cuda"), 3)
    assert {"triton", "sdpa_flash"} <= set(found), failed
