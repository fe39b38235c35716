"""`hf-attn bench memory`: peak memory of one attention call for several numbers of keys, with and without backward."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn_plugins.bench.peak_memory import PeakMemory
from hf_attn_plugins.bench.timing import write_table
from hf_attn_plugins.kernels.attend import attend
from hf_attn_plugins.kernels.cpu_fused import build as fused

KERNELS = ("cpu_fused", "cpu_tiled", "aten")
HEADS, HEAD_DIM, MIB = 8, 64, 2**20


def run(arguments: argparse.Namespace) -> None:
    """Measure and write the table.

    Raises:
        ValueError: a length or the rows are below 1, or the system does not report peak memory.
    """
    if min([*arguments.lengths, arguments.rows]) < 1:
        raise ValueError("--lengths and --rows must be at least 1.")
    rows = []
    for length in arguments.lengths:
        for kernel in KERNELS if fused.unavailable() is None else KERNELS[1:]:
            row: dict[str, Any] = {"keys": length, "rows": arguments.rows, "kernel": kernel}
            row["scores alone, MiB"] = HEADS * arguments.rows * length * 2 / MIB
            row["forward, MiB"] = _peak(
                arguments.rows, length, lambda q, k, v, name=kernel: _ours(q, k, v, name), False
            )
            row["with backward, MiB"] = _peak(
                arguments.rows, length, lambda q, k, v, name=kernel: _ours(q, k, v, name), True
            )
            row["SDPA with backward, MiB"] = _peak(arguments.rows, length, F.scaled_dot_product_attention, True)
            rows.append(row)
            print("  ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    notes = (
        f"bfloat16, {HEADS} heads, head_dim {HEAD_DIM}, full attention. The peak is without the inputs. `scores alone` "
        "is what the score matrix would need in bfloat16; no kernel here makes it. cpu_fused copies the values; with "
        "backward it also copies queries, keys and gradients, one after another. cpu_tiled keeps one tile of scores "
        "and copies of keys and values; with backward also float32 gradients of keys and values. All of these grow "
        "linearly with the number of keys."
    )
    print("written to", write_table(arguments.out, "memory", "Peak memory of one attention call", rows, notes))


def _ours(query: Tensor, key: Tensor, value: Tensor, kernel: str) -> Tensor:
    return attend(query, key, value, kernel=kernel).out


def _peak(rows: int, keys: int, function: Callable[..., Tensor], backward: bool) -> float:
    query = torch.randn(1, HEADS, rows, HEAD_DIM).to(torch.bfloat16).requires_grad_(backward)
    key, value = (torch.randn(1, HEADS, keys, HEAD_DIM).to(torch.bfloat16).requires_grad_(backward) for _ in range(2))
    with PeakMemory(query.device) as memory:
        out = function(query, key, value)
        if backward:
            out.sum().backward()
    if memory.bytes is None:
        raise ValueError("this system does not report the peak memory of a process: run on Linux with glibc.")
    return memory.bytes / MIB
