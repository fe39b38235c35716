"""PyTorch's fused operators for GPUs: which of them takes a call, and a call of one, with gradients.

| operator | dtypes | head_dim | where | heads that share keys | bias | gradient |
|---|---|---|---|---|---|---|
| flash | float16, bfloat16 | to 256 | sm_80 and newer, `AMD` | read once, on NVIDIA | no | to `FLASH_GRADIENT` |
| efficient | also float32 | any | NVIDIA, `AMD` | keys are repeated | yes | yes |
| cudnn | float16, bfloat16 | to 128 | sm_80 and newer | read once | no | no (not used for it) |

`operators_for` decides from numbers alone, so the table is tested without a GPU. The first operator is the default.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn_plugins.core.compat import fused_operator, rng_state_of_flash
from hf_attn_plugins.core.gpu import arch_of, generation
from hf_attn_plugins.core.gradient import needs_gradient
from hf_attn_plugins.core.partial import lse_dtype
from hf_attn_plugins.kernels.aten.ops import lse_as_column
from hf_attn_plugins.kernels.measured import fastest

OPERATORS = ("flash", "efficient", "cudnn")
HALF = (torch.float16, torch.bfloat16)
EXTRA = 8  # columns that `lse_as_column` adds in the backward
# Up to here flash computes gradients: everywhere, and on the chips that PyTorch does not exclude above it.
FLASH_GRADIENT, FLASH_GRADIENT_LARGE = 192, 256
LARGE = ("sm80", "sm90", "sm100", "sm103")
AMD = ("gfx90a", "gfx942", "gfx950")  # where PyTorch's kernels for ROCm run without an experimental switch
CUDNN_HEAD_DIM = 128


def operators_for(arch: str, dtype: torch.dtype, width: int, gradient: bool, bias: bool) -> tuple[str, ...]:
    """The operators that compute a call, the default first; empty where there is none.

    Args:
        arch: as `core.gpu.arch_of`.
        width: the larger of D and Dv.
        gradient: whether a gradient is needed, through out and lse.
        bias: whether a bias is added to the scores.
    """
    number = generation(arch)
    if not number and arch not in AMD:
        return ()
    half = dtype in HALF and (not number or number >= 80)
    found = []
    limit = 256
    if gradient:
        limit = (FLASH_GRADIENT_LARGE if arch in LARGE else FLASH_GRADIENT) - EXTRA
    if half and not bias and _up(width, 8) <= limit:
        found.append("flash")
    if dtype in (torch.float16, torch.float32) or half:
        found.append("efficient")
    if half and number and not bias and not gradient and _up(width, 8) <= CUDNN_HEAD_DIM:
        found.append("cudnn")
    return tuple(found)


def able(query: Tensor, key: Tensor, value: Tensor, bias: bool = False) -> tuple[str, ...]:
    """`operators_for` a call on a CUDA or ROCm device."""
    return operators_for(
        arch_of(query.device),
        query.dtype,
        max(query.shape[-1], value.shape[-1]),
        needs_gradient(query, key, value),
        bias,
    )


def kind_of(query: Tensor, key: Tensor, value: Tensor) -> str:
    """The kind of measurement (`measured.KINDS`) that says which kernel is fastest for a call."""
    if needs_gradient(query, key, value):
        return "backward"
    # Heads that share keys may have become rows.
    return "decode" if query.shape[2] <= 128 and 8 * query.shape[2] < key.shape[2] else "forward"


def length_of(key: Tensor) -> int | None:
    """The number of keys; None in a traced graph, where it may be a symbol."""
    return None if torch.compiler.is_compiling() else key.shape[2]


def operator_for(query: Tensor, key: Tensor, value: Tensor, bias: bool) -> str:
    """The operator of a call: the fastest one measured on this kind of GPU, else the default.

    Raises:
        NotImplementedError: none takes the dtype.
    """
    names = able(query, key, value, bias) if query.device.type == "cuda" else _on_meta(query, bias)
    if not names:
        raise NotImplementedError(f"PyTorch has no fused attention for {query.dtype} on {query.device.type}.")
    if len(names) == 1 or query.device.type != "cuda":
        return names[0]
    shape = (query.device, query.dtype, query.shape[-1], kind_of(query, key, value), length_of(key))
    return fastest(*shape, names) or names[0]


def _on_meta(query: Tensor, bias: bool) -> tuple[str, ...]:
    """Meta tensors stand for those of any device: shapes do not depend on the operator."""
    return ("flash",) if query.dtype in HALF and not bias else ("efficient",)


def fused(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, T, Dv) and lse (B, Hq, T) of one operator, differentiable in query, key and value.

    Args:
        query, key, value: (B, Hq, T, D), (B, Hkv, S, D) and (B, Hkv, S, Dv), with T, S above 0.
        is_causal: a square causal mask, T == S.
        scale: factor of the scores.
        bias: broadcasts to (B, Hq, T, S), added to the scaled scores, without gradient; every row sees a key.
    """
    name, width = operator_for(query, key, value, bias is not None), value.shape[-1]
    together = max(query.shape[-1], width)
    # Columns of zeros change no score. The kernels load rows of 16 bytes.
    query, key, value = (padded(x, _up(together, 4 if x.dtype == torch.float32 else 8)) for x in (query, key, value))
    groups = query.shape[1] // key.shape[1]
    if groups > 1 and (name == "efficient" or torch.version.hip):
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if bias is not None:
        bias = aligned_bias(bias.to(query.dtype), (*query.shape[:3], key.shape[2]))
    if needs_gradient(query, key, value):
        out, lse = FusedGPU.apply(query, key, value, is_causal, scale, bias, name)
    else:
        out, lse = call(name, query, key, value, is_causal, scale, bias)[:2]
    lse = lse.reshape(*lse.shape[:2], -1)[..., : query.shape[2]]
    return (out if out.shape[-1] == width else out[..., :width]), lse.to(lse_dtype(query))


def call(
    name: str, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, bias: Tensor | None
) -> tuple[Any, ...]:
    """One operator as it is: out, lse (efficient pads rows, cudnn has (B, H, T, 1)), and what the backward wants."""
    if name == "flash":
        operator = fused_operator("_scaled_dot_product_flash_attention")
        return operator(query, key, value, 0.0, is_causal, False, scale=scale)
    if name == "cudnn":
        operator = fused_operator("_scaled_dot_product_cudnn_attention")
        return operator(query, key, value, None, True, 0.0, is_causal, False, scale=scale)
    operator = fused_operator("_scaled_dot_product_efficient_attention")
    return operator(query, key, value, bias, True, 0.0, is_causal, scale=scale)


class FusedGPU(torch.autograd.Function):
    """`call` of flash or efficient, with gradients through out and lse."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, bias: Tensor | None,
        name: str,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        ctx.set_materialize_grads(False)
        out, lse, *rest = call(name, query, key, value, is_causal, scale, bias)
        ctx.rest = rng_state_of_flash(rest) if name == "flash" else tuple(rest)
        ctx.save_for_backward(query, key, value, out, lse, bias)
        ctx.options = (is_causal, scale, name)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, bias = ctx.saved_tensors
        is_causal, scale, name = ctx.options
        width = value.shape[-1]
        grad_out, grad_lse = grads
        grads = (grad_out, None if grad_lse is None else grad_lse[..., : query.shape[2]])
        grad_out, query, key, value, out = lse_as_column(grads, query, key, value, out)
        if name == "flash":
            operator = fused_operator("_scaled_dot_product_flash_attention_backward")
            cum_q, cum_k, max_q, max_k, seed, offset = ctx.rest
            found = operator(
                grad_out, query, key, value, out, lse, cum_q, cum_k, max_q, max_k, 0.0, is_causal, seed, offset,
                scale=scale,
            )  # fmt: skip
        else:
            operator = fused_operator("_scaled_dot_product_efficient_attention_backward")
            seed, offset = ctx.rest
            found = operator(
                grad_out, query, key, value, bias, out, lse, seed, offset, 0.0, [True, True, True, False], is_causal,
                scale=scale,
            )  # fmt: skip
        d_query, d_key, d_value = (each[..., :width] for each in found[:3])
        return d_query, d_key, d_value, None, None, None, None


def padded(tensor: Tensor, width: int) -> Tensor:
    """(..., D) with zeros up to `width` columns, rows that begin at multiples of 16 bytes, and stride 1 in D."""
    if tensor.shape[-1] < width:
        return F.pad(tensor, (0, width - tensor.shape[-1]))
    return tensor if _aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def aligned_bias(bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A bias expanded to `shape`, in memory whose rows begin at multiples of 16 elements, as the operator wants it."""
    bias = bias.expand(*bias.shape[:-1], shape[-1])
    if bias.stride(-1) != 1 or bias.shape[-1] % 16 or not _aligned(bias):
        bias = F.pad(bias, (0, -bias.shape[-1] % 16)).contiguous()[..., : shape[-1]]
    return bias.expand(shape)


def _aligned(tensor: Tensor) -> bool:
    size = tensor.element_size()
    steps = [stride for stride, length in zip(tensor.stride()[:-1], tensor.shape[:-1], strict=True) if length > 1]
    return tensor.stride(-1) == 1 and all(step * size % 16 == 0 for step in (*steps, tensor.storage_offset()))


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
