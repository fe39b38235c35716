"""Attention within a memory budget: exact from any storage, and never above the budget."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from hf_attn_plugins import cqs
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.cqs.planning import cost
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.testing import sharp_inputs
from tests import forks

TOKENS = 230
BUDGET = "70MiB"


def stored(kind: str, inputs: tuple[torch.Tensor, ...], folder: Path) -> list[Any]:
    if kind == "memory":
        return list(inputs)
    if kind == "safetensors":
        save_file(dict(zip("qkv", inputs, strict=True)), folder / "inputs.safetensors")
        file = safe_open(folder / "inputs.safetensors", "pt")
        return [file.get_slice(name) for name in "qkv"]
    found = []
    for name, x in zip("qkv", inputs, strict=True):
        array = np.memmap(folder / name, dtype=x.numpy().dtype, mode="w+", shape=tuple(x.shape))
        array[:] = x.numpy()
        array.flush()
        found.append(np.memmap(folder / name, dtype=array.dtype, mode="r", shape=array.shape))
    return found


@pytest.mark.parametrize("workers", [1, 7, 8, (3, 4)])
@pytest.mark.parametrize("kind", ["memory", "memmap", "safetensors"])
def test_equals_attend_from_any_storage(kind: str, workers: Any, tmp_path: Path) -> None:
    inputs = sharp_inputs(2, 4, 2, TOKENS, TOKENS, 8, 6)
    plan = cqs.plan(TOKENS, workers)
    for options in ({"is_causal": True}, {}, {"is_causal": True, "window": 40, "softcap": 9.0}):
        found = cqs.attention(*stored(kind, inputs, tmp_path), plan, memory_budget=BUDGET, **options)  # type: ignore[arg-type]
        expected = attend(*inputs, **options)  # type: ignore[arg-type]
        assert found.out.dtype == torch.float32
        torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-5, atol=1e-5)


def test_low_precision_results_are_merged_in_float32() -> None:
    inputs = sharp_inputs(1, 4, 2, TOKENS, TOKENS, 8, dtype=torch.bfloat16, sharpness=0.5)
    out, lse = cqs.attention(*inputs, cqs.plan(TOKENS, 31), memory_budget=BUDGET, folder=None)
    exact = attend(*(x.double() for x in inputs))
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    once = attend(*inputs).out
    assert (out - exact.out).abs().max() <= 2 * (once - exact.out).abs().max()


def test_padding_and_sinks() -> None:
    inputs = sharp_inputs(2, 4, 2, TOKENS, TOKENS, 8)
    real = torch.ones(2, TOKENS, dtype=torch.bool)
    real[0, :100] = False
    sinks = torch.tensor([0.0, 1.0, 2.0, 3.0])
    options: dict[str, Any] = {"mask": Mask(causal=True, key_padding=real), "sinks": sinks}
    plan = cqs.plan(TOKENS, 7)
    bounded: dict[str, Any] = {"memory_budget": BUDGET, "device": "cpu"}
    found, expected = (cqs.attention(*inputs, plan, **options, **more) for more in (bounded, {}))
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-5, atol=1e-5)


def test_results_go_where_they_are_asked_to(tmp_path: Path) -> None:
    inputs = sharp_inputs(1, 2, 1, TOKENS, TOKENS, 8)
    size = 2 * TOKENS * 8
    out = torch.from_file(str(tmp_path / "out"), shared=True, size=size).view(1, 2, TOKENS, 8)
    found = cqs.attention(*inputs, memory_budget=BUDGET, out=out, is_causal=True)
    assert found.out is out
    written = torch.from_numpy(np.fromfile(tmp_path / "out", dtype=np.float32).reshape(1, 2, TOKENS, 8))
    torch.testing.assert_close(written, attend(*inputs, is_causal=True).out, rtol=1e-5, atol=1e-5)


def test_refusals() -> None:
    inputs = sharp_inputs(1, 2, 1, TOKENS, TOKENS, 8)
    with pytest.raises(ValueError, match="too small for 230 tokens"):
        cqs.attention(*inputs, memory_budget="1MiB")
    with pytest.raises(ValueError, match=r"more than the budget of 1\.00 MiB"):
        cqs.attention(*inputs, cqs.plan(TOKENS, 7), memory_budget="1MiB")
    with pytest.raises(ValueError, match="no gradients"):
        cqs.attention(inputs[0].clone().requires_grad_(), *inputs[1:], memory_budget=BUDGET)
    with pytest.raises(ValueError, match="out must be"):
        cqs.attention(*inputs, memory_budget=BUDGET, out=torch.empty(3))
    with pytest.raises(ValueError, match="list: pass a tensor"):
        cqs.attention([1.0], *inputs[1:], memory_budget=BUDGET)
    with pytest.raises(ValueError, match="4-d"):
        cqs.attention(inputs[0][0], *inputs[1:], memory_budget=BUDGET)
    with pytest.raises(ValueError, match="one dtype"):
        cqs.attention(inputs[0].double(), *inputs[1:], memory_budget=BUDGET)


def test_a_budget_gives_the_same_plan_as_the_planner(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    choose = cost.choose
    monkeypatch.setattr(cost, "choose", lambda *args: asked.append(args) or choose(*args))
    cqs.attention(*sharp_inputs(1, 2, 1, 50, 50, 8), memory_budget="64MiB")
    assert asked == [(50, cost.CallShape(2, 1, 8, 8, 4), 2**26, asked[0][3])]


MEASURE = """
import ctypes, gc, sys, threading, time
import torch
from hf_attn_plugins import cqs
from hf_attn_plugins.kernels import attend

folder, dtype = sys.argv[1], getattr(torch, sys.argv[2])
torch.set_num_threads(1)
batch, heads, tokens, head_dim = 16, 8, 1024, 128

def mapped(name):
    size = batch * heads * tokens * head_dim
    return torch.from_file(f"{folder}/{name}", shared=True, size=size, dtype=dtype).view(batch, heads, tokens, head_dim)

def anonymous():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

query, key, value, out = map(mapped, "qkvo")
for tensor in (query, key, value):
    for row in tensor:
        row.normal_()
attend(query[:1, :, :64], key[:1, :, :64], value[:1, :, :64], is_causal=True)  # loads what is loaded once
gc.collect()
ctypes.CDLL("libc.so.6").malloc_trim(0)
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
_, lse = cqs.attention(query, key, value, memory_budget=int(sys.argv[3]), is_causal=True, out=out, folder=folder)
done.set()
watcher.join()
rows = slice(0, 1)
error = (out[rows] - attend(query[rows], key[rows], value[rows], is_causal=True).out).abs().max().item()
print(peak - before - lse.nbytes, 4 * out.nbytes, error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize(("dtype", "budget"), [("float32", 64), ("bfloat16", 96)])
def test_measured_peak_stays_within_the_budget(dtype: str, budget: int, tmp_path: Path) -> None:
    """Anonymous memory, which is what a process allocates, while inputs and results are mapped files."""
    run = forks.run(MEASURE, tmp_path, dtype, budget * 2**20)
    assert run.returncode == 0, run.stderr
    peak, tensors, error = (float(x) for x in run.stdout.split())
    assert 2**20 < peak <= budget * 2**20
    assert tensors > (3 if dtype == "float32" else 1.3) * budget * 2**20
    assert error < (1e-5 if dtype == "float32" else 0.05)
