"""`hf-attn bench triton --static`: registers and instructions of every compiled Triton kernel; needs no GPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_attn_plugins.bench.timing import markdown_table
from hf_attn_plugins.kernels.triton.support import INSTALLED, interpreting

NOTES = """\
Compiled ahead of time by `hf-attn bench triton --static`; no GPU was used and nothing here is a timing. Each row is one
launch of a call with {tokens} tokens, {heads} query and {kv_heads} key heads, batch 1 (decode: one row).

* registers: per thread; spilled: bytes of stack per thread; shared: bytes per block (limits: sm80 {sm80}, sm90 {sm90},
  sm100 {sm100}, sm120 {sm120}, gfx942 {gfx942}, gfx950 {gfx950}).
* rows x keys: tile sizes, warps and stages of the tuning table; with TMA, the same forward loading keys and values by
  TMA descriptors, which that table leaves off until a GPU has timed both.
* matrix: matrix instructions in the binary, by name. resident: blocks that fit on one multiprocessor (NVIDIA only).
* floor_ms: milliseconds of the call's matrix products at the data sheet's dense bfloat16 peak ({peaks} TFLOP/s):
  a lower bound for every kernel, not an estimate for this one.
  Left out for float32, decode, and kernels without products.
"""


def run(arguments: argparse.Namespace) -> int:
    """Compile, print row by row, write the table.

    Returns:
        0, or 1 where a requirement of `kernels.triton.static.problems` is not met.

    Raises:
        ValueError: --static is missing, or a target, dtype, head dim or kernel is unknown.
        ImportError: Triton is not installed.
    """
    if not arguments.static:
        raise ValueError("pass --static for the ahead-of-time table; `hf-attn bench gpu` times the kernels on a GPU.")
    if not INSTALLED:
        raise ImportError("Triton is not installed: pip install 'hf-attn-plugins[triton]'.")
    if interpreting():
        return _without_interpreter()
    from hf_attn_plugins.kernels.triton import static

    for given, known in ((arguments.targets, static.CHIPS), (arguments.dtypes, static.DTYPES)):
        if not set(given) <= set(known):
            raise ValueError(f"{', '.join(sorted(set(given) - set(known)))}: choose from {', '.join(known)}.")
    if not all(1 <= size <= 256 for size in arguments.head_dims):
        raise ValueError(f"--head-dims {arguments.head_dims}: sizes from 1 to 256 are compiled.")
    rows = []
    masks = [name == "causal" for name in arguments.masks]
    for row in static.report(arguments.targets, arguments.dtypes, arguments.head_dims, masks, arguments.kernels):
        rows.append(row)
        print("  ".join(f"{name} {value}" for name, value in as_cells(row).items()), flush=True)
    found = static.problems(rows)
    write(arguments.out, rows, found)
    print("\n".join(found) if found else "all requirements are met")
    return 1 if found else 0


def _without_interpreter() -> int:
    """Run the command again in a process without TRITON_INTERPRET: the interpreter's functions cannot be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-m", "hf_attn_plugins.cli", *sys.argv[1:]], env=environment).returncode


def as_cells(row: Any) -> dict[str, Any]:
    """One row of the Markdown table."""
    matrix = ", ".join(f"{count} {name}" for name, count in row.matrix.items()) or "-"
    return {
        "kernel": row.kernel,
        "target": row.target,
        "dtype": row.dtype,
        "head_dim": row.head_dim,
        "mask": "causal" if row.causal else "full",
        "rows x keys": row.tile,
        "registers": row.registers,
        "spilled": row.spilled,
        "shared": row.shared,
        "matrix": matrix,
        "resident": "-" if row.resident is None else row.resident,
        "floor_ms": "-" if row.floor_ms is None else row.floor_ms,
    }


def write(folder: Path, rows: Sequence[Any], found: Sequence[str]) -> None:
    """Write triton_static.md and triton_static.json.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError("no kernel was compiled: --kernels names forward, delta, dq, dkdv, decode or merge.")
    import torch
    import triton

    from hf_attn_plugins.kernels.triton import static

    versions = {"triton": triton.__version__, "torch": torch.__version__}
    limits = {name: chip.block_shared for name, chip in static.CHIPS.items()}
    peaks = ", ".join(f"{name} {chip.peak:g}" for name, chip in static.CHIPS.items())
    notes = NOTES.format(
        tokens=static.TOKENS, heads=static.HEADS, kv_heads=static.KV_HEADS, peaks=peaks, **limits
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    verdict = ["Requirements not met:", "", *(f"* {line}" for line in found)] if found else [
        "Required of bfloat16 at head_dim 64 and 128, and met by these rows: no spills in the forward on NVIDIA and in "
        "the backward on sm90, HGMMA in the forward on sm90; shared memory within the chip's limit everywhere."
    ]  # fmt: skip
    page = [
        "# Triton kernels, compiled ahead of time", "", f"Triton {versions['triton']}, torch {versions['torch']}.", "",
        notes, *verdict, "", *markdown_table([as_cells(row) for row in rows]), "",
    ]  # fmt: skip
    (folder / "triton_static.md").write_text("\n".join(page), encoding="utf-8")
    report = {"versions": versions, "problems": list(found), "rows": static.as_json(list(rows))}
    (folder / "triton_static.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
