"""`hf-attn bench memory`: peak memory of one attention call for several numbers of keys, with and without backward."""

from __future__ import annotations

import argparse
import functools
import itertools
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn_plugins.bench.peak_memory import PeakMemory
from hf_attn_plugins.bench.timing import write_table
from hf_attn_plugins.kernels.attend import attend
from hf_attn_plugins.kernels.cpu_fused import build as fused
from hf_attn_plugins.kernels.cpu_fused.instruction_sets import allowed, best

KERNELS = ("cpu_fused", "cpu_tiled", "aten")
HEADS, HEAD_DIM, MIB = 8, 64, 2**20
SDPA = F.scaled_dot_product_attention
LIMIT = "ONEDNN_MAX_CPU_ISA"


def run(arguments: argparse.Namespace) -> None:
    """Measure and write the table.

    Raises:
        ValueError: a length or the rows are below 1, or the system does not report peak memory.
    """
    if min([*arguments.lengths, arguments.rows]) < 1:
        raise ValueError("--lengths and --rows must be at least 1.")
    rows = []
    for name in arguments.dtypes:
        dtype = getattr(torch, name)
        kernels = KERNELS if fused.unavailable(dtype) is None else KERNELS[1:]
        for length, kernel in itertools.product(arguments.lengths, kernels):
            row = {"dtype": name, **_row(arguments.rows, length, dtype, kernel)}
            print("  ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
            rows.append(row)
    instructions = _instructions(arguments.dtypes)
    notes = (
        f"{HEADS} heads, head_dim {HEAD_DIM}, full attention. The peak is without the inputs. `scores alone` is what "
        f"the score matrix would need; no kernel here makes it. cpu_fused used {instructions}. It copies the "
        "values with AMX; in bfloat16 with backward it copies queries, keys, values and gradients, one after another. "
        "cpu_tiled keeps the scores of a tile for some heads; with backward also their gradients, and float32 sums of "
        "these heads' gradients. All of these grow at most linearly with the number of keys."
    )
    if LIMIT in os.environ:
        notes += f" PyTorch's products were limited by {LIMIT}={os.environ[LIMIT]}."
    print("written to", write_table(arguments.out, "memory", "Peak memory of one attention call", rows, notes))


def _row(rows: int, length: int, dtype: torch.dtype, kernel: str) -> dict[str, Any]:
    row: dict[str, Any] = {"keys": length, "rows": rows, "kernel": kernel}
    row["scores alone, MiB"] = HEADS * rows * length * dtype.itemsize / MIB
    for backward, what in ((False, "forward"), (True, "with backward")):
        for whose, attention in (("", functools.partial(_ours, kernel=kernel)), ("SDPA ", SDPA)):
            _peak(rows, length, dtype, attention, backward)  # what a first call loads is not counted
            row[f"{whose}{what}, MiB"] = _peak(rows, length, dtype, attention, backward)
    return row


def _instructions(dtypes: list[str]) -> str:
    chosen = {name: best(getattr(torch, name), allowed()) for name in dtypes}
    return ", ".join(f"{one if isinstance(one, str) else one.title} in {name}" for name, one in chosen.items())


def _ours(query: Tensor, key: Tensor, value: Tensor, kernel: str) -> Tensor:
    return attend(query, key, value, kernel=kernel).out


def _peak(rows: int, keys: int, dtype: torch.dtype, function: Callable[..., Tensor], backward: bool) -> float:
    sizes = (rows, keys, keys)
    query, key, value = (torch.randn(1, HEADS, n, HEAD_DIM).to(dtype).requires_grad_(backward) for n in sizes)
    with PeakMemory(query.device) as memory:
        out = function(query, key, value)
        if backward:
            out.sum().backward()
    if memory.bytes is None:
        raise ValueError("this system does not report the peak memory of a process: run on Linux with glibc.")
    return memory.bytes / MIB
