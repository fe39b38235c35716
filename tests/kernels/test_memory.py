"""Peak memory grows linearly with the number of keys: nothing of size T x S is ever held."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from hf_attn_plugins.kernels import attend
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


class LiveBytes(TorchDispatchMode):
    """`most`: the most bytes of tensors made under this mode that existed after any one operator."""

    def __init__(self):
        super().__init__()
        self.live, self.most = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        before = {
            x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves((args, kwargs)) if is_tensor(x)
        }
        for x in filter(is_tensor, torch.utils._pytree.tree_leaves(result)):
            storage = x.untyped_storage()
            if storage.data_ptr() not in before:
                self.live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.live = {at: kept for at, kept in self.live.items() if not kept[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.live.values()))
        return result


def is_tensor(x):
    return isinstance(x, torch.Tensor)


def extra_bytes(rows, keys, dtype, heads, backward, **options):
    """What `cpu_tiled` holds at once beside its results."""
    query, key, value = (torch.randn(1, heads, n, 32).to(dtype).requires_grad_(backward) for n in (rows, keys, keys))
    with LiveBytes() as live:
        out, lse = attend(query, key, value, kernel="cpu_tiled", **options)
        results = [out, lse]
        if backward:
            results += torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    return live.most - sum(x.untyped_storage().nbytes() for x in results)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", [{}, dict(softcap=5.0), dict(dropout=0.1)], ids=str)
def test_tiles_hold_nothing_that_grows_with_keys_or_heads(options, dtype, backward):
    """No copy of all keys and values, no float32 gradients of all of them, no tile of all heads."""
    few = extra_bytes(300, 1024, dtype, 8, backward, **options)
    many = extra_bytes(300, 4096, dtype, 16, backward, **options)
    values = 16 * 4096 * 32 * dtype.itemsize
    small = 300 * 16 * 32 * 4 + 4096 * 4  # grad_out of `extra_bytes`, and the hashes of dropout
    assert 0 < many < few + small + values // 16, (few, many)


def test_a_copied_tile_is_kept_for_one_chunk_of_heads_only():
    rows, keys, heads = 1024, 4096, 16
    assert extra_bytes(rows, keys, torch.bfloat16, heads, False) < 2 * heads * keys * 32 * 2
