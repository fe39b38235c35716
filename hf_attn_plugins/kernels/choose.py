"""Which kernel runs: the one place where capability and shape decide."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.kernels.aten import attend as aten
from hf_attn_plugins.kernels.cpu_fused import build
from hf_attn_plugins.kernels.cpu_fused import call as fused
from hf_attn_plugins.kernels.triton import support as triton_support

Kernel = Callable[[Tensor, Tensor, Tensor, Mask, float, float | None, float], Partial]

# Measured with `hf-attn bench tiled` (benchmarks/results/tiled.md): below these sizes the tiles' bookkeeping costs more
# than bf16 products save. Heads that share keys are rows of one product, so they count as rows.
MIN_TILED_ROWS, MIN_TILED_KEYS = 128, 1024
MIN_TILED_FULL = 512  # rows and keys of a call without a causal mask, no half of whose tiles is wasted
# Keys from which on the compiled kernels beat PyTorch's: those that hold queries, and those for a few rows.
MIN_FUSED_KEYS, MIN_DECODE_KEYS = 96, 256


def load(name: str) -> Kernel:
    """The kernel called `name`. Its module is imported here, on first use, by statements torch.compile can trace."""
    if name == "aten":
        from hf_attn_plugins.kernels.aten.attend import aten

        return aten
    if name == "cpu_tiled":
        from hf_attn_plugins.kernels.cpu.attend import cpu_tiled

        return cpu_tiled
    if name == "cpu_fused":
        from hf_attn_plugins.kernels.cpu_fused.attend import cpu_fused

        return cpu_fused
    if name == "triton":
        from hf_attn_plugins.kernels.triton.attend import triton

        return triton
    from hf_attn_plugins.kernels.reference import reference

    return reference


# torch.compile cannot trace questions about the CPU, and need not: it asks them once and keeps the answer.
@torch.compiler.assume_constant_result
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 matrix instructions (AVX512-BF16 or AMX, or Arm's BF16)."""
    return _cpu_has("avx512_bf16") or _cpu_has("amx_tile") or "bf16" in _arm_features()


@torch.compiler.assume_constant_result
def cpu_fuses() -> bool:
    """Whether `cpu_fused` runs here and is the best choice: AMX, which it does not use, multiplies faster still."""
    return not _cpu_has("amx_tile") and build.unavailable() is None


@functools.cache
def _cpu_has(feature: str) -> bool:
    return bool(getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)())


@functools.cache
def _arm_features() -> str:
    if platform.machine() != "aarch64":
        return ""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="ignore") as cpuinfo:
            return next((line for line in cpuinfo if line.startswith("Features")), "")
    except OSError:
        return ""


def worth_fusing(query: Tensor, key: Tensor) -> bool:
    """Whether a call is long enough for `cpu_fused`, and of its kind."""
    enough = MIN_FUSED_KEYS if query.shape[2] >= fused.FEW_ROWS else MIN_DECODE_KEYS
    return key.shape[2] >= enough and query.dtype == torch.bfloat16 and query.device.type == "cpu" and cpu_fuses()


def choose(query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float) -> str:
    """Name of the kernel for one call: Triton on GPUs; on CPUs PyTorch's fused op where nothing else pays."""
    call = (query, key, value, mask, softcap, dropout)
    if query.device.type == "cuda" and triton_support.supported(*call) is None:
        return "triton"
    if worth_fusing(query, key) and fused.unsupported(*call) is None:
        return "cpu_fused"
    if aten.supported(*call) is not None:
        return "cpu_tiled"
    fast_products = query.device.type == "cpu" and query.dtype == torch.bfloat16 and cpu_multiplies_bf16()
    return "cpu_tiled" if fast_products and _many_scores(query, key, mask.causal) else "aten"


def _many_scores(query: Tensor, key: Tensor, causal: bool) -> bool:
    rows, keys = query.shape[2] * (query.shape[1] // key.shape[1]), key.shape[2]
    return (rows >= MIN_TILED_ROWS and keys >= MIN_TILED_KEYS) or (not causal and min(rows, keys) >= MIN_TILED_FULL)
