"""Peak memory grows linearly with the number of keys: nothing of size T x S is ever held."""

from __future__ import annotations

import json
import sys

import pytest

from hf_attn_plugins.kernels.cpu_fused import build as fused
from tests import forks

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
