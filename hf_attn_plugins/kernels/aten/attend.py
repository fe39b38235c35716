"""PyTorch's own fused attention operators, those that return the lse, for every mask they can be composed for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial, merge
from hf_attn_plugins.kernels.aten.ops import FlashCPU, FlashCUDA, flash_cpu

FEW_ROWS = 16  # up to here one call with an additive (B, 1, 1, S) mask beats one call per row of the batch
QUICK_KEYS = 511  # up to here a call is so short that the time for choosing a kernel shows, and tiles never pay


def few_rows(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, mask: Mask | Tensor | None, scale: float
) -> Partial | None:
    """A short plain call on the CPU, straight to the fused operator; None where anything has to be looked at."""
    (_, heads, rows, head_dim), (_, kv_heads, num_keys, _) = query.shape, key.shape
    if not (0 < rows <= FEW_ROWS or num_keys <= QUICK_KEYS) or rows > num_keys:
        return None
    if head_dim != value.shape[-1] or query.numel() == 0:
        return None
    if mask is not None:
        if not isinstance(mask, Mask) or not mask.is_plain(num_keys - rows):
            return None
        is_causal = is_causal or mask.causal
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    is_full = rows == 1 or not is_causal
    if is_full and heads != kv_heads:
        return _full(query, key, value, scale)
    return Partial(*flash_cpu(query, key, value, not is_full, scale, None)) if is_full or rows == num_keys else None


def supported(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float
) -> str | None:
    """None when `aten` can do this call, else the reason why it cannot."""
    rows, num_keys = query.shape[2], key.shape[2]
    if softcap is not None:
        return "softcap"
    if dropout:
        return "dropout"
    if mask.query_segments is not None or mask.predicate is not None or mask.prefix:
        return "segments, a prefix or a predicate in the mask"
    if mask.window != (None, None):
        return "a sliding window shorter than the sequence"
    if mask.bias is not None:
        return _bias_unsupported(query, mask)
    if mask.key_padding is not None and torch.compiler.is_compiling():
        return "padding lengths, which cannot be read while compiling"
    if mask.causal:
        if not isinstance(mask.offset, int | None):
            return "an offset held in a tensor"
        if mask.start(rows, num_keys) + rows > num_keys:
            return "a causal offset beyond the last key"
    return None


def _bias_unsupported(query: Tensor, mask: Mask) -> str | None:
    assert mask.bias is not None
    if mask.bias.requires_grad:
        return "a float mask that needs a gradient"
    if mask.causal or mask.key_padding is not None:
        return "a mask tensor on top of a structured mask"
    return "a mask tensor off the CPU" if query.device.type != "cpu" else None


def aten(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, softcap: float | None, dropout: float
) -> Partial:
    """See `kernels.attend`. Masks are taken apart into square causal and full pieces, which are merged."""
    reason = supported(query, key, value, mask, softcap, dropout)
    if reason is not None:
        raise NotImplementedError(f"kernel 'aten' cannot do {reason}: use kernel=None, or 'cpu_tiled' on a CPU.")
    rows, num_keys = query.shape[2], key.shape[2]
    if mask.bias is not None:
        return _biased(query, key, value, mask.bias, scale)
    if mask.key_padding is not None:
        return _padded(query, key, value, mask, scale)
    if not mask.causal:
        return _full(query, key, value, scale)
    start = mask.start(rows, num_keys)
    if start < 0:  # rows before the first key
        head = Partial.empty(query[:, :, :-start], value.shape[-1])
        tail = aten(query[:, :, -start:], key, value, mask.replace(offset=0), scale, None, 0.0)
        return Partial(torch.cat([head.out, tail.out], 2), torch.cat([head.lse, tail.lse], 2))
    square = _flash(query, key[:, :, start:], value[:, :, start:], True, scale)
    if start == 0:
        return square
    return merge([_full(query, key[:, :, :start], value[:, :, :start], scale), square])


def _full(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Partial:
    batch, heads, rows, head_dim = query.shape
    groups = heads // key.shape[1]
    # One float32 row costs less than leaving threads idle at the end, which divide up the heads.
    idle = rows == 1 and query.dtype == torch.float32 and batch * key.shape[1] % _threads()
    if groups == 1 or not 0 < rows <= FEW_ROWS or idle:
        return _flash(query, key, value, False, scale)
    # A group's heads share their keys, and without a causal mask heads are as good as rows.
    folded = _flash(query.reshape(batch, key.shape[1], groups * rows, head_dim), key, value, False, scale)
    return Partial(folded.out.reshape(batch, heads, rows, -1), folded.lse.reshape(batch, heads, rows))


@torch.compiler.assume_constant_result
def _threads() -> int:
    return torch.get_num_threads()


def _padded(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Partial:
    padding = mask.key_padding
    assert padding is not None
    rows, num_keys = query.shape[2], key.shape[2]
    real = padding.expand(query.shape[0], num_keys)
    ends = (real * torch.arange(1, num_keys + 1, device=real.device)).amax(-1).tolist()
    counts = real.sum(-1).tolist()
    contiguous = all(bool(real[b, end - n : end].all()) for b, (end, n) in enumerate(zip(ends, counts, strict=True)))
    if not contiguous or (rows <= FEW_ROWS and not mask.causal):
        bias = torch.where(real, 0.0, -torch.inf).to(query.dtype)[:, None, None]
        if mask.causal:
            t, s = torch.arange(rows, device=real.device), torch.arange(num_keys, device=real.device)
            bias = bias.masked_fill(
                ~mask.replace(key_padding=None).visible(t, s, mask.start(rows, num_keys)), -torch.inf
            )
        return _biased(query, key, value, bias, scale)
    pieces = []
    plain = mask.replace(key_padding=None)
    for b, (end, count) in enumerate(zip(ends, counts, strict=True)):
        one = slice(b, b + 1)
        pieces.append(_run_of_keys(query[one], key[one], value[one], plain, end - count, end, scale))
    return Partial(torch.cat([piece.out for piece in pieces]), torch.cat([piece.lse for piece in pieces]))


def _run_of_keys(q: Tensor, k: Tensor, v: Tensor, mask: Mask, first: int, end: int, scale: float) -> Partial:
    """One row of the batch whose real keys are first..end: rows beyond them see all of them when causal."""
    if not mask.causal:
        return aten(q, k[:, :, first:end], v[:, :, first:end], mask, scale, None, 0.0)
    rows, start = q.shape[2], mask.start(q.shape[2], k.shape[2])
    inside = min(rows, max(0, end - start))
    pieces = []
    if inside:
        causal, stop = mask.replace(offset=start - first), start + inside
        pieces.append(aten(q[:, :, :inside], k[:, :, first:stop], v[:, :, first:stop], causal, scale, None, 0.0))
    if inside < rows:
        pieces.append(_full(q[:, :, inside:], k[:, :, first:end], v[:, :, first:end], scale))
    return Partial(torch.cat([piece.out for piece in pieces], 2), torch.cat([piece.lse for piece in pieces], 2))


def _biased(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Partial:
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    if bias.dtype == torch.bool:
        seen = bias
        bias = torch.where(bias, 0.0, -torch.inf).to(query.dtype)
    else:
        seen = bias > -torch.inf
    part = _flash(query, key, value, False, scale, bias.to(query.dtype))
    # The fused op reports lse 0 for rows that see nothing.
    return Partial(part.out, part.lse.masked_fill(~seen.any(-1), -torch.inf))


def _flash(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, bias: Tensor | None = None
) -> Partial:
    """One fused call: all keys, or a square causal mask; head dims are padded with zeros to the same size."""
    head_dim, head_dim_v = query.shape[-1], value.shape[-1]
    if query.numel() == 0 or key.numel() == 0:  # the operators divide by these sizes
        return Partial.empty(query, head_dim_v)
    if head_dim != head_dim_v:
        width = max(head_dim, head_dim_v)
        query, key, value = (F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    if query.device.type != "cpu":
        out, lse = FlashCUDA.apply(query, key, value, is_causal, scale, bias)
    elif torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        out, lse = FlashCPU.apply(query, key, value, is_causal, scale, bias)
    else:
        out, lse = flash_cpu(query, key, value, is_causal, scale, bias)
    return Partial(out if head_dim == head_dim_v else out[..., :head_dim_v], lse)
