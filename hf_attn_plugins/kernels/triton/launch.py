"""From tensors to launches: the grids and all arguments of the Triton kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_attn_plugins.kernels.rectangle_tables import tables
from hf_attn_plugins.kernels.segment_labels import Labels, key_bounds, row_bounds
from hf_attn_plugins.kernels.triton import backward as triton_backward
from hf_attn_plugins.kernels.triton import decode as triton_decode
from hf_attn_plugins.kernels.triton import dkdv as triton_dkdv
from hf_attn_plugins.kernels.triton import dq as triton_dq
from hf_attn_plugins.kernels.triton import forward as triton_forward
from hf_attn_plugins.kernels.triton.device import architecture, launch, multiprocessors, on_device, precision, takes_tma
from hf_attn_plugins.kernels.triton.tuning import Config, configuration

MAX_DECODE_ROWS = 16
MAX_DECODE_LANES = 128  # query rows times the heads that share a key head
MAX_SPLITS = 64

override: dict[str, Config] = {}  # global state: kind -> configuration, set by tuning and by static.record only


class Call(NamedTuple):
    """One call, besides its query, key and value.

    Attributes:
        scale, softcap: factor of the scores, above 0; bound of the scaled scores, or None.
        left, right: a row at position p sees keys p - left .. p + right; None for no bound.
        offset: position of row 0 on the key axis, an int or a 0-dim integer tensor.
        labels: padding and segments, or None.
        bias: (B, H, T, S), float or bool, with strides of 0 where it broadcasts, or None.
        dropout: probability that a weight is dropped.
        row_hashes, key_hashes: `Drops.tables`, or None.
        pieces: a plan as `rectangle_tables.flat` writes it; empty for one rectangle of everything.
    """

    scale: float
    softcap: float | None
    left: int | None
    right: int | None
    offset: int | Tensor
    labels: Labels | None
    bias: Tensor | None
    dropout: float
    row_hashes: Tensor | None
    key_hashes: Tensor | None
    pieces: tuple[int, ...]


def empty(*size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory for the kernels to fill; tests replace this function to fill it with NaN first."""
    return torch.empty(*size, dtype=dtype, device=device)


def token_major(batch: int, heads: int, tokens: int, dim: int, like: Tensor) -> Tensor:
    """(B, H, T, D), in memory (B, T, H, D), which the output projection then reads without a copy."""
    return empty(batch, tokens, heads, dim, dtype=like.dtype, device=like.device).transpose(1, 2)


def forward(query: Tensor, key: Tensor, value: Tensor, call: Call) -> tuple[Tensor, Tensor, Tensor]:
    """Attention of query (B, Hq, T, D), key (B, Hkv, S, D) and value (B, Hkv, S, Dv), of one dtype.

    Returns:
        out (B, Hq, T, Dv) in the query's dtype, lse (B, Hq, T) and row_lse (B, Hq, T; see `tiles.store_lse`), float32.
    """
    if _without_bfloat16(query):
        out, lse, row_lse = forward(query.float(), key.float(), value.float(), call)
        return out.to(query.dtype), lse, row_lse
    batch, heads, rows, _ = query.shape
    out = token_major(batch, heads, rows, value.shape[-1], query)
    lse, row_lse = (empty(batch, heads, rows, dtype=torch.float32, device=query.device) for _ in range(2))
    if not lse.numel():
        return out, lse, row_lse
    group_size = heads // key.shape[1]
    decoding = rows <= MAX_DECODE_ROWS and rows * group_size <= MAX_DECODE_LANES and not call.pieces
    with on_device(query):
        (_decode if decoding else _prefill)(query, key, value, call, out, lse, row_lse)
    return out, lse, row_lse


def _prefill(query: Tensor, key: Tensor, value: Tensor, call: Call, out: Tensor, lse: Tensor, row_lse: Tensor) -> None:
    config = _config("forward", query, value, call)
    batch, heads, rows, _ = query.shape
    bounds, plan, num_pieces = _row_side(call, rows, config.block_m, query.device)
    grid = (-(-rows // config.block_m) * batch * heads,)
    launch(
        triton_forward.forward_kernel, grid,
        query=query, key=key, value=value, out=out, lse=lse, row_lse=row_lse,
        **_strides(query_bhtd=query, key_bhsd=key, value_bhsd=value, out_bhtd=out),
        **_side(call, bounds), **_plan(plan, num_pieces), **_numbers(call, query, key),
        **_constants(query, value, call),
        HAS_PLAN=bool(call.pieces), TMA=config.tma and takes_tma(key, value),
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _decode(query: Tensor, key: Tensor, value: Tensor, call: Call, out: Tensor, lse: Tensor, row_lse: Tensor) -> None:
    config = _config("decode", query, value, call)
    batch, heads, rows, _ = query.shape
    group_size, num_keys = heads // key.shape[1], key.shape[2]
    tasks = batch * key.shape[1]
    splits = max(
        1, min(-(-2 * multiprocessors(query.device) // tasks), -(-num_keys // (2 * config.block_n)), MAX_SPLITS)
    )
    parts = (batch, heads, rows, splits)
    part_out = empty(*parts, value.shape[-1], dtype=torch.float32, device=query.device)
    part_lse = empty(*parts, dtype=torch.float32, device=query.device)
    bounds = None if call.labels is None else row_bounds(call.labels, rows, rows)
    constants = _constants(query, value, call)
    side = _side(call, bounds)
    del side["stride_bounds_tile"]  # all rows are one tile
    launch(
        triton_decode.decode_kernel, (splits * tasks,),
        query=query, key=key, value=value, part_out=part_out, part_lse=part_lse,
        **_strides(query_bhtd=query, key_bhsd=key, value_bhsd=value), **side, **_numbers(call, query, key), **constants,
        num_splits=splits, BLOCK_M=max(16, _power(rows * group_size)), BLOCK_N=config.block_n,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    launch(
        triton_decode.merge_kernel, (batch * heads * rows,),
        part_out=part_out, part_lse=part_lse, out=out, lse=lse, row_lse=row_lse, **_strides(out_bhtd=out),
        num_rows=rows, num_heads=heads, num_splits=splits, HEAD_DIM_V=constants["HEAD_DIM_V"],
        BLOCK_DV=constants["BLOCK_DV"], BLOCK_SPLITS=_power(splits), num_warps=4,
    )  # fmt: skip


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, row_lse: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The gradients of query, key and value, from those of out (B, Hq, T, Dv) and lse (B, Hq, T; None for 0)."""
    if _without_bfloat16(query):
        wide = (query.float(), key.float(), value.float(), out.float())
        d_query, d_key, d_value = backward(grad_out.float(), grad_lse, *wide, row_lse, call)
        return d_query.to(query.dtype), d_key.to(query.dtype), d_value.to(query.dtype)
    batch, heads, rows, head_dim = query.shape
    kv_heads, num_keys, head_dim_v = value.shape[1:]
    d_query = token_major(batch, heads, rows, head_dim, query)
    d_key = token_major(batch, kv_heads, num_keys, head_dim, key)
    d_value = token_major(batch, kv_heads, num_keys, head_dim_v, value)
    if not rows or not batch:
        return d_query, d_key.zero_(), d_value.zero_()
    delta = empty(batch, heads, rows, dtype=torch.float32, device=query.device)
    constants = _constants(query, value, call)
    with on_device(query):
        launch(
            triton_backward.delta_kernel, (-(-rows // 64) * batch * heads,),
            out=out, grad_out=grad_out, grad_lse=None if grad_lse is None else grad_lse.contiguous(), delta=delta,
            **_strides(out_bhtd=out, grad_bhtd=grad_out), num_rows=rows, num_heads=heads,
            HAS_GRAD_LSE=grad_lse is not None, HEAD_DIM_V=head_dim_v, BLOCK_DV=constants["BLOCK_DV"], BLOCK_M=64,
            num_warps=4,
        )  # fmt: skip
        shared = {
            "query": query, "key": key, "value": value, "grad_out": grad_out, "row_lse": row_lse, "delta": delta,
            **_strides(query_bhtd=query, key_bhsd=key, value_bhsd=value, grad_bhtd=grad_out),
            **_numbers(call, query, key), **constants, "HAS_PLAN": bool(call.pieces),
        }  # fmt: skip
        config = _config("dq", query, value, call)
        bounds, plan, num_pieces = _row_side(call, rows, config.block_m, query.device)
        launch(
            triton_dq.dq_kernel, (-(-rows // config.block_m) * batch * heads,),
            d_query=d_query, **_strides(dq_bhtd=d_query), **shared, **_side(call, bounds), **_plan(plan, num_pieces),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        if not num_keys:
            return d_query, d_key, d_value
        config = _config("dkdv", query, value, call)
        bounds = None if call.labels is None else key_bounds(call.labels, rows, config.block_n)
        plan, num_pieces = tables(call.pieces, num_keys, config.block_n, True, query.device)
        launch(
            triton_dkdv.dkdv_kernel, (-(-num_keys // config.block_n) * batch * kv_heads,),
            d_key=d_key, d_value=d_value, **_strides(dk_bhsd=d_key, dv_bhsd=d_value), **shared, **_side(call, bounds),
            **_plan(plan, num_pieces),
            BLOCK_M=config.block_m, BLOCK_N=config.block_n, num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return d_query, d_key, d_value


def _row_side(call: Call, rows: int, tile: int, device: torch.device) -> tuple[Tensor | None, Tensor | None, int]:
    bounds = None if call.labels is None else row_bounds(call.labels, rows, tile)
    return bounds, *tables(call.pieces, rows, tile, False, device)


def _strides(**tensors: Tensor) -> dict[str, int]:
    """Strides by name: `query_bhtd=query` gives stride_query_b, stride_query_h, stride_query_t and stride_query_d."""
    named: dict[str, int] = {}
    for key, tensor in tensors.items():
        name, _, dims = key.rpartition("_")
        named |= {f"stride_{name}_{dim}": stride for dim, stride in zip(dims, tensor.stride(), strict=True)}
    return named


def _side(call: Call, bounds: Tensor | None) -> dict[str, Any]:
    """The tensors that depend on the pair: labels with their bounds, bias, offset and hashes; and their strides."""
    row_labels, key_labels = (None, None) if call.labels is None else (call.labels.rows, call.labels.keys)
    bias_strides = (0, 0, 0, 0) if call.bias is None else call.bias.stride()
    bounds_batch, bounds_tile = _stride2(bounds)
    return {
        "row_labels": row_labels,
        "key_labels": key_labels,
        "bounds": bounds,
        "bias": call.bias,
        "offset_pointer": call.offset if isinstance(call.offset, Tensor) else None,
        "row_hashes": call.row_hashes,
        "key_hashes": call.key_hashes,
        "stride_row_labels": _stride2(row_labels)[0],
        "stride_key_labels": _stride2(key_labels)[0],
        "stride_bounds_b": bounds_batch,
        "stride_bounds_tile": bounds_tile,
        **{f"stride_bias_{dim}": stride for dim, stride in zip("bhts", bias_strides, strict=True)},
    }


def _plan(plan: Tensor | None, num_pieces: int) -> dict[str, Any]:
    batch, tile = _stride2(plan)
    return {"plan": plan, "stride_plan_b": batch, "stride_plan_tile": tile, "num_pieces": num_pieces}


def _stride2(tensor: Tensor | None) -> tuple[int, int]:
    """Strides over batch (0 where all rows of the batch share the tensor) and over the next dimension."""
    if tensor is None:
        return 0, 0
    return (0 if tensor.shape[0] == 1 else tensor.stride(0)), tensor.stride(1)


def _numbers(call: Call, query: Tensor, key: Tensor) -> dict[str, float]:
    return {
        "num_rows": query.shape[2],
        "num_keys": key.shape[2],
        "num_heads": query.shape[1],
        "group_size": query.shape[1] // key.shape[1],
        "offset": 0 if isinstance(call.offset, Tensor) else call.offset,
        "left": call.left or 0,
        "right": call.right or 0,
        "scale": call.scale,
        "softcap": call.softcap or 1.0,
        "dropout": call.dropout,
    }


def _constants(query: Tensor, value: Tensor, call: Call) -> dict[str, Any]:
    labels = call.labels
    head_dim, head_dim_v = query.shape[-1], value.shape[-1]
    return {
        "HAS_LEFT": call.left is not None,
        "HAS_RIGHT": call.right is not None,
        "HAS_OFFSET": isinstance(call.offset, Tensor),
        "LABELS": 0 if labels is None else (1 if labels.rows is None else 2),
        "BIAS": 0 if call.bias is None else (2 if call.bias.dtype == torch.bool else 1),
        "HAS_SOFTCAP": call.softcap is not None,
        "HAS_DROPOUT": call.dropout > 0,
        "HEAD_DIM": head_dim,
        "HEAD_DIM_V": head_dim_v,
        "BLOCK_D": max(16, _power(head_dim)),
        "BLOCK_DV": max(16, _power(head_dim_v)),
        "PRECISION": precision(query.dtype, architecture(query.device)),
    }


def _config(kind: str, query: Tensor, value: Tensor, call: Call) -> Config:
    head_dim = max(query.shape[-1], value.shape[-1])
    return override.get(kind) or configuration(
        architecture(query.device), kind, query.dtype, head_dim, call.right is not None
    )


def _without_bfloat16(tensor: Tensor) -> bool:
    """Whether to convert to float32: Triton's interpreter multiplies the bits of bfloat16 tiles as integers."""
    return tensor.dtype == torch.bfloat16 and architecture(tensor.device) == "interpreter"


def _power(number: int) -> int:
    """The smallest power of two >= `number`."""
    return 1 << max(0, number - 1).bit_length()
