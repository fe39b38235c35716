"""Peak memory grows linearly with the number of keys: nothing of size T x S is ever held."""

from __future__ import annotations

import json
import sys

import pytest

from hf_attn_plugins.kernels.cpu_fused import build as fused
from tests import forks
from tests.kernels.fused_cases import kinds

CODE = """
import json, sys, torch
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.bench.peak_memory import PeakMemory

torch.set_num_threads(1)
kernel, dtype = sys.argv[1], getattr(torch, sys.argv[2])
peaks = []
for keys in (2048, 4096, 8192):
    query = torch.randn(1, 4, 512, 32).to(dtype).requires_grad_()
    key, value = (torch.randn(1, 4, keys, 32).to(dtype).requires_grad_() for _ in range(2))
    with PeakMemory(query.device) as memory:
        attend(query, key, value, is_causal=True, kernel=kernel).out.sum().backward()
    peaks.append(memory.bytes)
print(json.dumps(peaks))
"""


CASES = [("cpu_fused", "bfloat16"), ("cpu_tiled", "bfloat16"), ("cpu_tiled", "float32"), ("aten", "float32")]


@pytest.mark.parametrize("kernel,dtype", CASES)
def test_growth(kernel, dtype):
    if kernel == "cpu_fused" and fused.unavailable() is not None:
        pytest.skip(f"cpu_fused: {fused.unavailable()}")
    if not sys.platform.startswith("linux"):
        pytest.skip("peak memory is read from Linux's /proc")
    done = forks.run(CODE, kernel, dtype)
    assert done.returncode == 0, done.stderr
    small, middle, large = json.loads(done.stdout)
    scores = 4 * 512 * (8192 - 4096) * (2 if dtype == "bfloat16" else 4)  # what holding the new scores alone would take
    inputs = 4 * 32 * (8192 - 4096) * 4 * 8  # keys, values, their copies and float32 gradients
    assert large - middle < max(inputs, scores // 2), (small, middle, large)
    assert large < 3 * middle, (small, middle, large)


FORWARD = """
import os, sys, torch
name, dtype, rows, keys = sys.argv[1], getattr(torch, sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
os.environ["HF_ATTN_PLUGINS_INSTRUCTIONS"] = name
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.bench.peak_memory import PeakMemory

torch.set_num_threads(1)
query, key, value = (torch.randn(1, 4, n, 32).to(dtype) for n in (rows, keys, keys))
attend(query, key, value, kernel="cpu_fused")
with PeakMemory(query.device) as memory:
    attend(query, key, value, kernel="cpu_fused")
print(memory.bytes)
"""


@pytest.mark.parametrize("kind", kinds(("bfloat16", "float32")), ids=lambda kind: f"{kind.instructions}-{kind.dtype}")
@pytest.mark.parametrize("rows", (32, 256))
def test_a_forward_copies_no_keys_and_no_values(kind, rows):
    """AMX copies the values of a call with more rows than one block holds: that is said in kernels/README.md."""
    if not sys.platform.startswith("linux"):
        pytest.skip("peak memory is read from Linux's /proc")
    keys = 16384
    done = forks.run(FORWARD, kind.instructions, str(kind.dtype).removeprefix("torch."), str(rows), str(keys))
    assert done.returncode == 0, done.stderr
    values = 4 * keys * 32 * kind.dtype.itemsize
    copies = 1 if kind.instructions == "amx" and rows > 64 else 0
    assert copies * values * 0.9 <= int(done.stdout) < (copies + 0.5) * values
