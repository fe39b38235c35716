"""One call of the compiled kernels: what they can do, and tensors and mask as the C struct that they read."""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.kernels.cpu_fused.build import Unavailable, library, unavailable
from hf_attn_plugins.kernels.cpu_fused.instruction_sets import STORED, InstructionSet, allowed, best
from hf_attn_plugins.kernels.rectangle_tables import tables
from hf_attn_plugins.kernels.segment_labels import key_bounds, make_labels, row_bounds

STEP, TILE, MAX_DIM = 6, 96, 256  # as in tile.h
MAX_ROWS = 256  # as in decode.c
MOST_PARTS = 8  # of a key head in the float32 backward: each has a float32 gradient of the query
SPLIT_ROWS = 32  # with fewer rows the keys are split between threads: queries would leave half of the lanes empty
FAR = 2**40  # a window without a bound


class _Tensor(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("token", c_int64)]


class _Call(ctypes.Structure):
    """`Call` of call.h, field by field."""

    _fields_ = [
        *((name, _Tensor) for name in ("query", "key", "value", "out")),
        *((name, _Tensor) for name in ("grad_out", "grad_query", "grad_key", "grad_value")),
        *((name, c_void_p) for name in ("lse", "grad_lse", "delta")),
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "num_rows", "num_keys", "dim", "dim_v")),
        *((name, c_int64) for name in ("start", "back", "ahead", "prefix")),
        *((name, c_void_p) for name in ("row_labels", "key_labels")),
        *((name, c_int64) for name in ("row_labels_batch", "key_labels_batch")),
        *((name, c_void_p) for name in ("row_bounds", "key_bounds")),
        *((name, c_int64) for name in ("row_bounds_batch", "key_bounds_batch")),
        *((name, c_void_p) for name in ("row_pieces", "key_pieces")),
        *((name, c_int64) for name in ("row_pieces_most", "key_pieces_most")),
        *((name, c_int64) for name in ("row_pieces_batch", "key_pieces_batch")),
        ("pairs", c_void_p),
        ("partials", c_void_p),
        ("scale", c_float),
        *((name, c_int32) for name in ("threads", "dtype", "parts")),
        ("lse_rest", c_void_p),
    ]


def checked_library(dtype: torch.dtype) -> tuple[InstructionSet, ctypes.CDLL]:
    """The instruction set that serves a dtype and its library, once its `Call` is known to be as large as `_Call`.

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
    loaded.hf_call_size.restype = c_int64
    size = loaded.hf_call_size()
    if size != ctypes.sizeof(_Call):
        raise RuntimeError(
            f"Call has {size} bytes in C and {ctypes.sizeof(_Call)} in Python: call.h and call.py differ."
        )
    return chosen, loaded


def reason_against(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float
) -> str | None:
    """Why `cpu_fused` cannot do this call; None when it can."""
    if query.device.type != "cpu" or query.dtype not in STORED:
        return f"{query.dtype} on {query.device.type}: they are for float32 and bfloat16 on CPUs"
    if any(dim % 16 or not 16 <= dim <= MAX_DIM for dim in (query.shape[-1], value.shape[-1])):
        return f"head_dim {query.shape[-1]} and {value.shape[-1]}: multiples of 16 up to {MAX_DIM} are needed"
    if softcap is not None or dropout:
        return "softcap" if softcap is not None else "dropout"
    if mask.bias is not None or mask.predicate is not None:
        return "a mask tensor or a predicate in the mask"
    return unavailable(query.dtype)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    scale: float,
    plan: tuple[int, ...] = (),
    lse_rest: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, T, Dv), laid out token by token as models want it next, and lse (B, Hq, T).

    Args:
        plan: `rectangle_tables.flat` of the rectangles that are computed; () is every row and every key.
        lse_rest: for calls that a backward follows, in float32 products: filled with what rounding left out of the lse.
            Scores are then summed in the order of the backward. A weight near 1 would else be off by the rounding of a
            large score.
    """
    out, lse = Partial.unfilled(query, value.shape[-1])
    if not key.shape[2]:
        return out.zero_(), lse.fill_(-torch.inf)
    if not out.numel():
        return out, lse
    chosen, compiled = checked_library(query.dtype)
    query, key, value = (_rows(x) for x in (query, key, value))
    rows = query.shape[2] * (query.shape[1] // key.shape[1])
    few = query.shape[2] < SPLIT_ROWS and rows <= MAX_ROWS and not plan
    few = few and lse_rest is None
    call, _kept = _call(query, key, value, mask, scale, plan, chosen.lanes, out=out, keys_too=few)
    call.lse = lse.data_ptr()
    call.lse_rest = None if lse_rest is None else lse_rest.data_ptr()
    if few:
        chunks = -(-key.shape[2] // chosen.split_keys)
        partials = lse.new_empty(key.shape[:2].numel() * chunks * rows * (value.shape[-1] + 2))
        call.partials = partials.data_ptr()
        compiled.hap_decode(ctypes.byref(call))
        return out, lse
    if chosen.name == "avx512_bf16":
        pairs = query.new_empty(key.shape[:2].numel() * _padded(key.shape[2]) * value.shape[-1])
        call.pairs = pairs.data_ptr()
    compiled.hap_forward(ctypes.byref(call))
    return out, lse


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
    plan: tuple[int, ...] = (),
    lse_rest: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, contiguous; `lse_rest` as `forward` has filled it."""
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    if not (out.numel() and key.shape[2]):
        for grad in grads:
            grad.zero_()
        return grads[0], grads[1], grads[2]
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    query, key, value, grad_out, out = (_rows(x) for x in (query, key, value, grad_out, out))
    lse = lse.contiguous()
    chosen, compiled = checked_library(query.dtype)
    delta = torch.empty_like(lse)
    call, _kept = _call(query, key, value, mask, scale, plan, chosen.lanes, out=out, grad_out=grad_out, keys_too=True)
    call.grad_query, call.grad_key, call.grad_value = (_tensor(x) for x in grads)
    grad_lse = None if grad_lse is None else grad_lse.contiguous()
    call.grad_lse = None if grad_lse is None else grad_lse.data_ptr()
    call.lse, call.delta = lse.data_ptr(), delta.data_ptr()
    call.lse_rest = None if lse_rest is None else lse_rest.data_ptr()
    if chosen.name == "avx512_bf16":
        pairs = query.new_empty(_pairs_of_backward(query, key, value))
        call.pairs = pairs.data_ptr()
    else:
        blocks = -(-key.shape[2] // chosen.lanes)
        call.parts = _parts(key.shape[:2].numel(), blocks, call.threads)
        own = call.parts - (query.dtype == torch.float32)  # one part is the gradient itself
        partials = lse.new_empty(own * query.numel())
        call.partials = partials.data_ptr()
    compiled.hap_backward(ctypes.byref(call))
    return grads[0], grads[1], grads[2]


def _pairs_of_backward(query: Tensor, key: Tensor, value: Tensor) -> int:
    """Numbers of 16 bit that the AVX512-BF16 backward needs besides its results."""
    return max(
        key.shape[:2].numel() * _padded(key.shape[2]) * key.shape[-1],
        query.shape[:2].numel() * _padded(query.shape[2]) * (query.shape[-1] + value.shape[-1]),
    )


def _parts(key_heads: int, blocks: int, threads: int) -> int:
    """How many threads share a key head in the float32 backward: the fewest that give all threads about as much to do.

    Example: 3 key heads for 2 threads make 2 parts, 6 pieces of work; 8 key heads need 1 part.
    """
    most = max(1, min(MOST_PARTS, blocks))
    fitting = (n for n in range(1, most) if key_heads * n % threads == 0 or key_heads * n >= 4 * threads)
    return next(fitting, most)


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    scale: float,
    plan: tuple[int, ...],
    lanes: int,
    *,
    out: Tensor,
    grad_out: Tensor | None = None,
    keys_too: bool = False,
) -> tuple[_Call, list[Tensor | None]]:
    """The struct, and the tensors that it points into: keep them until the call is over."""
    (batch, heads, rows, dim), (kv_heads, num_keys) = query.shape, key.shape[1:3]
    left, right = mask.window
    call = _Call(_tensor(query), _tensor(key), _tensor(value), _tensor(out))
    if grad_out is not None:
        call.grad_out = _tensor(grad_out)
    call.batch, call.heads, call.kv_heads, call.num_rows, call.num_keys = batch, heads, kv_heads, rows, num_keys
    call.dim, call.dim_v, call.scale, call.threads = dim, value.shape[-1], scale, torch.get_num_threads()
    call.dtype = STORED.index(query.dtype)
    call.start, call.prefix = mask.start(rows, num_keys), mask.prefix
    call.back = FAR if left is None else left
    call.ahead = 0 if mask.causal else FAR if right is None else right
    kept: list[Tensor | None] = []
    if plan:
        kept = [_set_pieces(call, "row", plan, rows, lanes)]
        if keys_too:
            kept.append(_set_pieces(call, "key", plan, num_keys, lanes))
    labels = make_labels(mask.key_padding, mask.query_segments, mask.key_segments)
    if labels is None:
        return call, kept
    for what, tensor, count in (("segments", labels.rows, rows), ("padding or segments", labels.keys, num_keys)):
        if tensor is not None and (tensor.shape[0] not in (1, batch) or tensor.shape[1:] != (count,)):
            raise ValueError(
                f"the mask's {what} must be (1 or {batch}, {count}) for these tensors, got {tuple(tensor.shape)}."
            )
    of_rows = row_bounds(labels, rows, lanes)
    of_keys = key_bounds(labels, rows, lanes) if keys_too else None
    fields = {"row_labels": labels.rows, "key_labels": labels.keys, "row_bounds": of_rows, "key_bounds": of_keys}
    for name, tensor in fields.items():
        if tensor is not None:
            setattr(call, name, tensor.data_ptr())
            setattr(call, f"{name}_batch", tensor.stride(0) if tensor.shape[0] > 1 else 0)
    return call, [*kept, *fields.values()]


def _set_pieces(call: _Call, side: str, plan: tuple[int, ...], length: int, lanes: int) -> Tensor:
    """Point the call to the rectangles per `lanes` rows ("row") or keys ("key"); returns their table."""
    entries, most = tables(plan, length, lanes, side == "key", torch.device("cpu"))
    assert entries is not None
    setattr(call, f"{side}_pieces", entries.data_ptr())
    setattr(call, f"{side}_pieces_most", most)
    setattr(call, f"{side}_pieces_batch", entries.stride(0) if entries.shape[0] > 1 else 0)
    return entries


def _tensor(tensor: Tensor) -> _Tensor:
    return _Tensor(tensor.data_ptr(), *tensor.stride()[:3])


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with stride(-1) == 1; copied only if needed."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _padded(rows: int) -> int:
    """`padded_rows` of tile.h."""
    return -(-(rows + STEP) // TILE) * TILE
