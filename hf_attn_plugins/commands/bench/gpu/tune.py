"""`hf-attn bench gpu --tune FILE`: time the candidate tile sizes of every kernel and write the best of each."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch

from hf_attn_plugins.bench.gpu_timing import medians_ms
from hf_attn_plugins.bench.hardware import describe
from hf_attn_plugins.kernels.triton import launch as triton_launch
from hf_attn_plugins.kernels.triton.device import architecture
from hf_attn_plugins.kernels.triton.tuning import KINDS, Config, candidates, configuration, key

LENGTH, HIDDEN = 8192, 2048  # tokens, and heads x head_dim


def tune(
    path: Path, device: torch.device, head_dims: list[int], deadline: float, length: int = LENGTH
) -> dict[str, Config]:
    """Time candidates of every kernel in bfloat16, until `deadline` (`time.monotonic`), and write the best of each.

    The file holds {"configurations": {name in the tuning table: configuration}, "hardware": ...}.

    Returns:
        Name in the tuning table -> best configuration; kernels for which no time was left are missing.
    """
    arch, best = architecture(device), {}
    for head_dim in head_dims:
        for kind in KINDS:
            for causal in (True, False):
                if time.monotonic() > deadline:
                    break
                found = _times(kind, head_dim, causal, device, length)
                if found:
                    best[key(arch, kind, torch.bfloat16, head_dim, causal)] = min(found, key=lambda c: found[c])
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"configurations": {name: list(config) for name, config in best.items()}, "hardware": describe(device)}
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return best


def _times(kind: str, head_dim: int, causal: bool, device: torch.device, length: int) -> dict[Config, float]:
    """Candidate -> milliseconds of the forward, or of the whole backward, with this candidate for the kernel `kind`."""
    heads = max(1, HIDDEN // head_dim)
    rows = 1 if kind == "decode" else length
    query = torch.randn(1, heads, rows, head_dim, device=device, dtype=torch.bfloat16)
    keys = torch.randn(1, heads, length, head_dim, device=device, dtype=torch.bfloat16)
    offset = length - rows
    right = 0 if causal else None
    call = triton_launch.Call(head_dim**-0.5, None, None, right, offset, None, None, 0.0, None, None, ())
    out, _, row_lse = triton_launch.forward(query, keys, keys, call)
    arch = architecture(device)

    def run_with(config: Config) -> Any:
        def run() -> None:
            triton_launch.override[kind] = config
            try:
                if kind in ("forward", "decode"):
                    triton_launch.forward(query, keys, keys, call)
                else:
                    triton_launch.backward(out, None, query, keys, keys, out, row_lse, call)
            finally:
                triton_launch.override.clear()

        return run

    default = configuration(arch, kind, query.dtype, head_dim, causal)
    tried = {str(index): config for index, config in enumerate([default, *candidates(kind, head_dim)])}
    found, _ = medians_ms({name: run_with(config) for name, config in tried.items()}, [()], device, 7)
    return {tried[name]: ms for name, ms in found.items()}
