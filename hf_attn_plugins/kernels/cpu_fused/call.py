"""One call of the compiled kernels: what they can do, forward and backward. The struct that they read: `layout.py`."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.kernels.cpu_fused.build import Unavailable, library, unavailable
from hf_attn_plugins.kernels.cpu_fused.instruction_sets import STORED, InstructionSet, allowed, best
from hf_attn_plugins.kernels.cpu_fused.layout import (
    BIASES,
    CallStruct,
    four_dims,
    make_call,
    point_to,
    set_dropout,
    set_grad_bias,
)

MAX_DIM = 256  # as in tile.h
MAX_ROWS = 256  # as in decode.c
MOST_PARTS = 8  # of a key head in the float32 backward: each has a float32 gradient of the query
SPLIT_ROWS = 32  # with fewer rows the keys are split between threads: queries would leave half of the lanes empty


def checked_library(dtype: torch.dtype) -> tuple[InstructionSet, ctypes.CDLL]:
    """The instruction set that serves a dtype and its library, once its `Call` is known to be as large as `CallStruct`.

    Raises:
        Unavailable: there is none on this machine.
        RuntimeError: the two sizes differ, so the fields of one of them were changed alone.
    """
    return _checked(dtype, allowed())


@functools.cache
def _checked(dtype: torch.dtype, most: str | None) -> tuple[InstructionSet, ctypes.CDLL]:
    chosen = best(dtype, most)
    if isinstance(chosen, str):
        raise Unavailable(chosen)
    loaded = library(chosen)
    loaded.hf_call_size.restype = ctypes.c_int64
    size = loaded.hf_call_size()
    if size != ctypes.sizeof(CallStruct):
        raise RuntimeError(
            f"Call has {size} bytes in C and {ctypes.sizeof(CallStruct)} in Python: call.h and layout.py differ."
        )
    return chosen, loaded


def reason_against(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float
) -> str | None:
    """Why `cpu_fused` cannot do this call; None when it can."""
    if not query.is_cpu or query.dtype not in STORED:
        return f"{query.dtype} on {query.device.type}: they are for float32, bfloat16 and float16 on CPUs"
    return misfit(query, key, value, mask, softcap) or unavailable(query.dtype)


def misfit(query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None) -> str | None:
    """What `cpu_fused` cannot do of a call whose dtype and device it serves; None where it can do all."""
    dim, dim_v = query.shape[3], value.shape[3]
    if dim % 16 or dim_v % 16 or not (0 < dim <= MAX_DIM and 0 < dim_v <= MAX_DIM):
        return f"head_dim {dim} and {dim_v}: multiples of 16 up to {MAX_DIM} are needed"
    if mask.predicate is not None:
        return "a predicate in the mask"
    if mask.bias is not None:
        return _reason_against_bias(query, key, mask.bias, softcap)
    return None


def _reason_against_bias(query: Tensor, key: Tensor, bias: Tensor, softcap: float | None) -> str | None:
    if bias.dtype not in BIASES:
        return f"a mask tensor in {bias.dtype}: bool, float32, bfloat16 or float16 is needed"
    if not (bias.requires_grad and torch.is_grad_enabled()):
        return None
    if softcap is not None:
        return "the gradient of a mask tensor beside a softcap"
    if four_dims(bias).shape[2:] != (query.shape[2], key.shape[2]):
        return "the gradient of a mask tensor that is the same for many rows or keys"
    return None


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    plan: tuple[int, ...] = (),
    lse_rest: Tensor | None = None,
    dropout: float = 0.0,
) -> Partial:
    """out (B, Hq, T, Dv), laid out token by token as models want it next, and lse (B, Hq, T).

    Args:
        plan: `rectangle_tables.flat` of the rectangles that are computed; () is every row and every key.
        lse_rest: for calls that a backward follows, in float32 products: filled with what rounding left out of the lse.
            Scores are then summed in the order of the backward. A weight near 1 would else be off by the rounding of a
            large score.
        dropout: the weights that are dropped follow from `mask.drops`.
    """
    (batch, heads, rows, _), (kv_heads, keys), dim_v = query.shape, key.shape[1:3], value.shape[3]
    out, lse = result = Partial.unfilled(query, dim_v)
    if not keys:
        return Partial(out.zero_(), lse.fill_(-torch.inf))
    if not (batch and heads and rows):
        return result
    chosen, compiled = checked_library(query.dtype)
    if not query.stride()[3] == key.stride()[3] == value.stride()[3] == 1:
        query, key, value = _rows(query), _rows(key), _rows(value)
    few = rows < SPLIT_ROWS and rows * (heads // kv_heads) <= MAX_ROWS and not plan
    few = few and lse_rest is None and not dropout
    call, _kept = make_call(
        query, key, value, mask, scale, softcap, plan, chosen.lanes, out=out, lse=lse, bounds=not few
    )
    _hashes = set_dropout(call, dropout, mask.drops) if dropout else None
    if lse_rest is not None:
        call.lse_rest = lse_rest.data_ptr()
    if few:
        chunks = -(-keys // chosen.split_keys)
        partials = lse.new_empty_strided((batch * heads * rows * chunks * (dim_v + 2) + batch * kv_heads,), (1,))
        call.partials = partials.data_ptr()
        compiled.hap_decode(ctypes.byref(call))
        return result
    if chosen.walked and chosen.pairs_first and rows > chosen.lanes:  # fewer rows read each value once
        pairs = query.new_empty(batch * kv_heads * (_padded(keys, *chosen.walked) * dim_v + 2))
        call.pairs = pairs.data_ptr()
    compiled.hap_forward(ctypes.byref(call))
    return result


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    scale: float,
    softcap: float | None = None,
    plan: tuple[int, ...] = (),
    lse_rest: Tensor | None = None,
    needs_bias: bool = False,
    dropout: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key and value, contiguous, and of `mask.bias` if `needs_bias`, else None.

    Args:
        lse_rest, dropout: as in `forward`.
    """
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    bias = mask.bias if needs_bias else None
    if not (out.numel() and key.shape[2]):
        for grad in grads:
            grad.zero_()
        return grads[0], grads[1], grads[2], None if bias is None else torch.zeros_like(bias)
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    query, key, value, grad_out, out = (_rows(x) for x in (query, key, value, grad_out, out))
    lse = lse.contiguous()
    chosen, compiled = checked_library(query.dtype)
    delta = torch.empty_like(lse)
    call, _kept = make_call(
        query, key, value, mask, scale, softcap, plan, chosen.lanes, out=out, lse=lse, grad_out=grad_out, keys_too=True
    )
    _hashes = set_dropout(call, dropout, mask.drops)
    call.grad_query, call.grad_key, call.grad_value = (point_to(x) for x in grads)
    of_bias = None if bias is None else set_grad_bias(call, bias)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    call.grad_lse = None if grad_lse is None else grad_lse.data_ptr()
    call.delta = delta.data_ptr()
    call.lse_rest = None if lse_rest is None else lse_rest.data_ptr()
    if chosen.walked:
        pairs = query.new_empty(_pairs_of_backward(query, key, value, *chosen.walked))
        call.pairs = pairs.data_ptr()
    else:
        blocks = -(-key.shape[2] // chosen.lanes)
        batches = 1 if of_bias is not None and of_bias.shape[0] == 1 else key.shape[0]  # as in altered.h
        call.parts = _parts(batches * key.shape[1], blocks, call.threads)
        own = call.parts - (query.dtype == torch.float32)  # one part is the gradient itself
        partials = lse.new_empty(own * query.numel())
        call.partials = partials.data_ptr()
    compiled.hap_backward(ctypes.byref(call))
    if bias is not None and of_bias is not None:
        of_bias = of_bias.reshape(bias.shape).to(bias.dtype)
    return grads[0], grads[1], grads[2], of_bias


def _pairs_of_backward(query: Tensor, key: Tensor, value: Tensor, step: int, tile: int) -> int:
    """Numbers of 16 bit that a backward with `walked` rows in pairs needs besides its results."""
    return max(
        key.shape[:2].numel() * _padded(key.shape[2], step, tile) * key.shape[-1],
        query.shape[:2].numel() * _padded(query.shape[2], step, tile) * (query.shape[-1] + value.shape[-1]),
    )


def _parts(key_heads: int, blocks: int, threads: int) -> int:
    """How many threads share a key head in the float32 backward: the fewest that give all threads about as much to do.

    Example: 3 key heads for 2 threads make 2 parts, 6 pieces of work; 8 key heads need 1 part.
    """
    most = max(1, min(MOST_PARTS, blocks))
    fitting = (n for n in range(1, most) if key_heads * n % threads == 0 or key_heads * n >= 4 * threads)
    return next(fitting, most)


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with stride(-1) == 1; copied only if needed."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _padded(rows: int, step: int, tile: int) -> int:
    """`padded_rows` of products.h."""
    return -(-(rows + step) // tile) * tile
