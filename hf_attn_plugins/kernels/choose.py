"""Which kernel runs: the one place that compares kernel names, capability and shape; for GPUs with `on_device.py`."""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn_plugins.core.cpu import fields
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.options import KERNELS
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.core.warn import warn_once
from hf_attn_plugins.kernels.aten import attend as aten
from hf_attn_plugins.kernels.cpu_fused import build
from hf_attn_plugins.kernels.cpu_fused import call as fused
from hf_attn_plugins.kernels.cpu_fused.attend import cpu_fused, cpu_fused_rectangles, unasked
from hf_attn_plugins.kernels.cpu_fused.instruction_sets import STORED, allowed, best, cpu_has_kept
from hf_attn_plugins.kernels.cpu_fused.sizes import FUSED_FROM, LEAST_FEW, LEAST_ROWS, MASKED_FROM, FusedFrom
from hf_attn_plugins.kernels.flex import attend as flex
from hf_attn_plugins.kernels.on_device import before_named_triton, kernel_for, one_launch

Kernel = Callable[[Tensor, Tensor, Tensor, Mask, float, float | None, float], Partial]


class Choice(NamedTuple):
    """The kernel of one call: its name, for reports, and the function `run(query, key, value, mask, scale, softcap,
    dropout) -> Partial`."""

    name: str
    run: Kernel


PLAIN = ("cpu", "meta")  # every other device is decided in `on_device.py`
# Kernels of short calls, which each line of Python delays: "short" and "fused" do not ask `reason_against` once more.
ATEN, SHORT, FUSED = Choice("aten", aten.aten), Choice("aten", aten.run_one_operator), Choice("cpu_fused", unasked)

# Measured with `hf-attn bench tiled` (benchmarks/results/tiled.md): below these sizes tiles cost more than
# fast bfloat16 products save. Heads that share keys are rows of one product, so they count as rows.
MIN_TILED_ROWS, MIN_TILED_KEYS = 128, 1024
MIN_TILED_FULL = 512  # rows and keys of a call without a causal mask, no half of whose tiles is wasted


def load(name: str) -> Kernel:
    """The kernel called `name`. Its module is imported here, on first use, by statements torch.compile can trace."""
    if name == "aten":
        return ATEN.run
    if name == "cpu_tiled":
        from hf_attn_plugins.kernels.cpu.attend import cpu_tiled

        return cpu_tiled
    if name == "cpu_fused":
        return cpu_fused
    if name == "triton":
        from hf_attn_plugins.kernels.triton.attend import triton

        return triton
    if name == "flex":
        from hf_attn_plugins.kernels.flex.attend import flex

        return flex
    from hf_attn_plugins.kernels.reference import reference

    return reference


def load_rectangles(name: str) -> Callable[..., Partial]:
    """The function that computes a list of rectangles in one launch, of a kernel that has one."""
    if name == "triton":
        from hf_attn_plugins.kernels.triton.attend import triton_rectangles

        return triton_rectangles
    if name == "flex":
        from hf_attn_plugins.kernels.flex.attend import flex_rectangles

        return flex_rectangles
    return cpu_fused_rectangles


# torch.compile cannot trace questions about the CPU: it asks once and keeps the answer as a constant.
@torch.compiler.assume_constant_result
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bfloat16 matrix instructions (AVX512-BF16 or AMX, or Arm's BF16)."""
    return cpu_has_kept("avx512_bf16") or cpu_has_kept("amx_tile") or "bf16" in _arm_features()


@torch.compiler.assume_constant_result
def tiles_pay() -> bool:
    """Whether large products in bfloat16 gain more than tiles cost; with AMX, PyTorch's operator uses it as well."""
    return cpu_multiplies_bf16() and not cpu_has_kept("amx_tile")


@torch.compiler.assume_constant_result
def fused_from(dtype: torch.dtype, altered: bool = False) -> FusedFrom | None:
    """The sizes of this CPU; None where `cpu_fused` does not run or is not known to be the fastest.

    They are in `MASKED_FROM` for calls with a mask tensor, a softcap or dropout (`altered`), else in `FUSED_FROM`.
    PyTorch's own operator multiplies bfloat16 by AMX: without it, `cpu_fused` would be slower.
    """
    chosen = best(dtype, allowed())
    table = MASKED_FROM if altered else FUSED_FROM
    sizes = None if isinstance(chosen, str) else table.get((chosen.name, dtype))
    if sizes is None or isinstance(chosen, str):
        return None
    if dtype == torch.bfloat16 and chosen.name != "amx" and not altered and cpu_has_kept("amx_tile"):
        return None
    return sizes if build.reason_against(chosen) is None else None


@functools.cache
def _arm_features() -> str:
    return fields().get("Features", "") if platform.machine() == "aarch64" else ""


def worth_fusing(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float, is_plan: bool = False
) -> bool:
    """Whether `cpu_fused` would pay: a CPU and a dtype for which it was measured, and enough keys."""
    if not query.is_cpu or query.dtype not in STORED:
        return False
    few, keys = query.shape[2] < fused.SPLIT_ROWS, key.shape[2]
    altered = softcap is not None or dropout > 0 or mask.bias is not None
    if not altered and keys < (LEAST_FEW if few else LEAST_ROWS):
        return False
    sizes = fused_from(query.dtype, altered)
    if sizes is None:
        return False
    if few and sizes.few_win(query, key, mask):
        return True
    if (altered or few) and (is_plan or aten.reason_against(query, key, value, mask, softcap, dropout) is not None):
        return True
    if few:
        return False
    full = not (mask.causal or mask.prefix or is_plan) and mask.window == (None, None) and mask.has_no_tensors()
    return keys >= (sizes.full if full else sizes.rows)


def choose_rectangles(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float, kernel: str | None,
    plan: Sequence[Sequence[Rectangle]] | None = None,
) -> Callable[..., Partial] | None:  # fmt: skip
    """The function that computes a whole list of rectangles in one launch, or None: each is a call of its own.

    Args:
        plan: the rectangles; None while only the question is whether to make a list of them.
    """
    call = (query, key, value, mask, softcap, dropout)
    if kernel is None and query.device.type not in PLAIN:
        name = one_launch(*call, plan)
        return None if name is None else load_rectangles(name)
    if kernel in ("triton", "flex"):
        return load_rectangles(kernel)
    if kernel == "cpu_fused" or (kernel is None and worth_fusing(*call, True)):
        whole = mask.prefix == 0 and not torch.compiler.is_compiling()
        if whole and fused.reason_against(*call) is None:
            return load_rectangles("cpu_fused")
    return None


def only_pytorch_runs(
    dtype: torch.dtype, mask: Mask, softcap: float | None, dropout: float, kernel: str | None
) -> bool:
    """Whether PyTorch's operators compute such calls on the CPU, whatever their sizes, or else `cpu_fused` in float32,
    which needs less memory."""
    if kernel is not None:
        return kernel == "aten"
    plain = mask.window == (None, None) and not mask.prefix and mask.has_no_tensors()
    return plain and softcap is None and not dropout and dtype != torch.bfloat16


def _flex_or_next(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, softcap: float | None, dropout: float
) -> Partial:
    """FlexAttention, or the next kernel where it cannot be compiled: then once a warning, and it stays off."""
    try:
        return flex.flex(query, key, value, mask, scale, softcap, dropout)
    except flex.Failed as error:
        choice = after_failed_flex(error, query, key, value, mask, softcap, dropout)
        return choice.run(query, key, value, mask, scale, softcap, dropout)


def after_failed_flex(
    error: flex.Failed, query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float
) -> Choice:
    """Turn FlexAttention off in this process, with a warning, and say what computes a call instead."""
    flex.turn_off(str(error))
    choice = choose(query, key, value, mask, softcap, dropout)
    warn_once(f"FlexAttention is off in this process, '{choice.name}' computes instead: {error}")
    return choice


def choose(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    softcap: float | None,
    dropout: float,
    kernel: str | None = None,
) -> Choice:
    """What to call: the kernel named `kernel`; by itself PyTorch's operators on GPUs, and where nothing else pays.

    Raises:
        ValueError: no kernel has this name.
        NotImplementedError: no kernel computes the call on its device.
    """
    if kernel is not None:
        if kernel not in KERNELS:
            raise ValueError(f"kernel={kernel!r} is unknown: choose one of {', '.join(KERNELS)}, or None.")
        if kernel == "triton":
            before_named_triton(query, key, value, mask, softcap, dropout)
        return Choice(kernel, load(kernel))
    call = (query, key, value, mask, softcap, dropout)
    if not query.is_cpu and query.device.type not in PLAIN:  # `is_cpu` takes a seventh of the time, in every call
        name = kernel_for(*call)
        return Choice(name, _flex_or_next if name == "flex" else load(name))
    if worth_fusing(*call):
        # Here the library is known to be there: `fused_from` has asked.
        if fused.misfit(query, key, value, mask, softcap) is None:
            return FUSED
    elif aten.is_short(*call):
        return SHORT
    if aten.reason_against(*call) is not None:
        return Choice("cpu_tiled", load("cpu_tiled"))
    fast_products = query.device.type == "cpu" and query.dtype == torch.bfloat16 and tiles_pay()
    tiled = fast_products and _many_scores(query, key, mask.causal)
    return Choice("cpu_tiled", load("cpu_tiled")) if tiled else ATEN


def _many_scores(query: Tensor, key: Tensor, causal: bool) -> bool:
    rows, keys = query.shape[2] * (query.shape[1] // key.shape[1]), key.shape[2]
    return (rows >= MIN_TILED_ROWS and keys >= MIN_TILED_KEYS) or (not causal and min(rows, keys) >= MIN_TILED_FULL)
