"""Tensors and mask of one call as the C struct that the compiled kernels read."""

from __future__ import annotations

import ctypes
import struct
from ctypes import c_float, c_int32, c_int64, c_uint32, c_void_p

import torch
from torch import Tensor

from hf_attn_plugins.core.drops import BITS, Drops, share_below
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.kernels.cpu_fused.instruction_sets import STORED
from hf_attn_plugins.kernels.rectangle_tables import tables
from hf_attn_plugins.kernels.segment_labels import key_bounds, make_labels, row_bounds

FAR = 2**40  # a window without a bound
BIASES = (torch.float32, torch.bfloat16, torch.bool, torch.float16)  # in the order of altered.h


class TensorStruct(ctypes.Structure):
    """`Tensor` of call.h."""

    _fields_ = [("data", c_void_p), ("batch", c_int64), ("head", c_int64), ("token", c_int64)]


class CallStruct(ctypes.Structure):
    """`Call` of call.h, field by field."""

    _fields_ = [
        *((name, TensorStruct) for name in ("query", "key", "value", "out")),
        *((name, TensorStruct) for name in ("grad_out", "grad_query", "grad_key", "grad_value")),
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
        ("softcap", c_float),
        ("bias_dtype", c_int32),
        ("bias", c_void_p),
        *((name, c_int64) for name in ("bias_batch", "bias_head", "bias_row", "bias_key")),
        ("grad_bias", c_void_p),
        *((name, c_int64) for name in ("grad_bias_batch", "grad_bias_head")),
        ("drop_below", c_uint32),
        ("keep_scale", c_float),
        *((name, c_void_p) for name in ("row_hashes", "key_hashes")),
    ]


_CODES = {TensorStruct: "P3q", c_void_p: "P", c_int64: "q", c_float: "f", c_int32: "i"}
_COMMON = ("query", "key", "value", "out", "lse", "batch", "heads", "kv_heads", "num_rows", "num_keys", "dim", "dim_v",
           "start", "back", "ahead", "prefix", "scale", "threads", "dtype", "softcap")  # fmt: skip
# The fields that every call has, in the struct's order; zeros fill the others. One `pack` takes a third of the time of
# as many attributes.
_pack_common = struct.Struct(
    "".join(_CODES[kind] if name in _COMMON else f"{ctypes.sizeof(kind)}x" for name, kind, *_ in CallStruct._fields_)
).pack


def make_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    scale: float,
    softcap: float | None,
    plan: tuple[int, ...],
    lanes: int,
    *,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor | None = None,
    bounds: bool = True,
    keys_too: bool = False,
) -> tuple[CallStruct, list[Tensor | None]]:
    """The struct, and the tensors that it points into beside the given ones: keep them until the call is over.

    Args:
        lanes: held rows of a block of the instruction set.
        bounds: whether the bounds that follow from labels are needed: decoding finds them itself.
        keys_too: whether bounds and plan are also needed per block of keys.

    Raises:
        ValueError: padding, segments or a mask tensor of another shape than the call.
    """
    (batch, heads, rows, dim), (kv_heads, num_keys) = query.shape, key.shape[1:3]
    left, right = mask.window
    back, ahead = FAR if left is None else left, 0 if mask.causal else FAR if right is None else right
    common = _pack_common(
        query.data_ptr(), *query.stride()[:3], key.data_ptr(), *key.stride()[:3],
        value.data_ptr(), *value.stride()[:3], out.data_ptr(), *out.stride()[:3], lse.data_ptr(),
        batch, heads, kv_heads, rows, num_keys, dim, value.shape[3],
        mask.start(rows, num_keys), back, ahead, mask.prefix,
        scale, torch.get_num_threads(), STORED.index(query.dtype), softcap or 0.0,
    )  # fmt: skip
    call = CallStruct.from_buffer_copy(common)
    if grad_out is not None:
        call.grad_out = point_to(grad_out)
    kept: list[Tensor | None] = []
    if mask.bias is not None:
        kept.append(_set_bias(call, mask.bias))
    if plan:
        kept.append(_set_pieces(call, "row", plan, rows, lanes))
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
    of_rows = row_bounds(labels, rows, lanes) if bounds else None
    of_keys = key_bounds(labels, rows, lanes) if bounds and keys_too else None
    fields = {"row_labels": labels.rows, "key_labels": labels.keys, "row_bounds": of_rows, "key_bounds": of_keys}
    for name, tensor in fields.items():
        if tensor is not None:
            setattr(call, name, tensor.data_ptr())
            setattr(call, f"{name}_batch", tensor.stride(0) if tensor.shape[0] > 1 else 0)
    return call, [*kept, *fields.values()]


def _set_bias(call: CallStruct, bias: Tensor) -> Tensor:
    """Point the call to a mask tensor where it lies: its strides say along which dimensions it is broadcast."""
    shape = (call.batch, call.heads, call.num_rows, call.num_keys)
    whole = four_dims(bias)
    if any(have not in (1, want) for have, want in zip(whole.shape, shape, strict=True)):
        raise ValueError(f"a mask tensor must broadcast to {shape} for these tensors, got {tuple(bias.shape)}.")
    strides = (stride if size > 1 else 0 for size, stride in zip(whole.shape, whole.stride(), strict=True))
    call.bias_batch, call.bias_head, call.bias_row, call.bias_key = strides
    call.bias, call.bias_dtype = whole.data_ptr(), BIASES.index(bias.dtype)
    return whole


def set_dropout(call: CallStruct, dropout: float, drops: Drops | None) -> list[Tensor]:
    """Drop a weight where the hash of its place is small; 0 drops none. Returns the hashes, which `call` points to."""
    call.keep_scale = 1 / (1 - dropout)
    if not dropout:
        return []
    assert drops is not None
    hashes = drops.tables()
    call.drop_below = share_below(dropout) << (32 - BITS)
    call.row_hashes, call.key_hashes = (x.data_ptr() for x in hashes)
    return list(hashes)


def set_grad_bias(call: CallStruct, bias: Tensor) -> Tensor:
    """Point the call to a float32 gradient of a mask tensor, which begins as 0: (1 or B, 1 or Hq, T, S)."""
    shape = four_dims(bias).shape
    grad = torch.zeros(shape, dtype=torch.float32)
    call.grad_bias = grad.data_ptr()
    call.grad_bias_batch, call.grad_bias_head = (grad.stride(i) if shape[i] > 1 else 0 for i in (0, 1))
    return grad


def four_dims(bias: Tensor) -> Tensor:
    """A mask tensor with leading dimensions of size 1 up to four."""
    return bias.reshape((1,) * (4 - bias.ndim) + bias.shape)


def _set_pieces(call: CallStruct, side: str, plan: tuple[int, ...], length: int, lanes: int) -> Tensor:
    """Point the call to the rectangles per `lanes` rows ("row") or keys ("key"); returns their table."""
    entries, most = tables(plan, length, lanes, side == "key", torch.device("cpu"))
    assert entries is not None
    setattr(call, f"{side}_pieces", entries.data_ptr())
    setattr(call, f"{side}_pieces_most", most)
    setattr(call, f"{side}_pieces_batch", entries.stride(0) if entries.shape[0] > 1 else 0)
    return entries


def point_to(tensor: Tensor) -> TensorStruct:
    """The address and the strides of batch, head and token."""
    batch, head, token, _ = tensor.stride()
    return TensorStruct(tensor.data_ptr(), batch, head, token)
