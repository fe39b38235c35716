"""The kernel "aten": PyTorch's fused attention operators that return the lse. Several calls make up for other masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn_plugins.core.gradient import needs_gradient
from hf_attn_plugins.core.mask import FULL, Mask
from hf_attn_plugins.core.partial import Partial, merge
from hf_attn_plugins.kernels.aten import gpu
from hf_attn_plugins.kernels.aten.ops import FlashCPU, flash_cpu
from hf_attn_plugins.kernels.cpu_fused.instruction_sets import cpu_has_kept

# Up to so many rows, heads that share keys become rows, and one call with a bias is faster than one per prompt.
FOLDED_ROWS = 16
# In bfloat16 by AMX, fewer folded rows than this are slower than heads of one row: 0.64 - 0.88 of the time for 2 and 3.
FOLDED_FROM = 4
# Up to so many keys, choosing a kernel takes a noticeable part of the time, and tiles are never faster.
SHORT_KEYS = 511


def is_short(query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float) -> bool:
    """Whether `run_one_operator` takes this call: few rows or keys, CPU, a plain causal or full mask, no gradient."""
    (_, _, rows, head_dim), num_keys = query.shape, key.shape[2]
    if not (0 < rows <= FOLDED_ROWS or num_keys <= SHORT_KEYS) or rows > num_keys:
        return False
    if head_dim != value.shape[-1] or not query.is_cpu or query.numel() == 0:
        return False
    if softcap is not None or dropout or not (mask is FULL or mask.is_plain(num_keys - rows)):
        return False
    if mask.causal and 1 < rows != num_keys:
        return False
    return not needs_gradient(query, key, value)


def run_one_operator(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, softcap: float | None, dropout: float
) -> Partial:
    """One call of PyTorch's CPU operator, for calls that `is_short`."""
    is_causal = mask.causal and query.shape[2] > 1
    if not is_causal and folding_pays(query, key):
        return _folded(query, key, value, scale, flash_cpu)
    return Partial(*flash_cpu(query, key, value, is_causal, scale, None))


def reason_against(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float
) -> str | None:
    """Why `aten` cannot compute this call; None when it can."""
    rows, num_keys = query.shape[2], key.shape[2]
    if softcap is not None:
        return "softcap"
    if dropout:
        return "dropout"
    if mask.query_segments is not None or mask.predicate is not None or mask.prefix:
        return "segments, a prefix or a predicate in the mask"
    if mask.window != (None, None):
        return "a sliding window shorter than the sequence"
    if query.device.type not in ("cpu", "meta"):
        return _reason_on_device(query, key, value, mask)
    if mask.bias is not None:
        return _reason_against_bias(query, mask)
    if mask.key_padding is not None and torch.compiler.is_compiling():
        return "padding lengths, which cannot be read while compiling"
    if mask.causal:
        if not isinstance(mask.offset, int | None):
            return "an offset held in a tensor"
        if mask.start(rows, num_keys) + rows > num_keys:
            return "a causal offset beyond the last key"
    return None


def _reason_on_device(query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> str | None:
    if query.device.type != "cuda":
        return f"{query.device.type}: no operator of PyTorch there has shown that its lse is right"
    as_bias = on_device_as_bias(query, mask)
    if not gpu.able(query, key, value, as_bias):
        return f"{query.dtype} on {gpu.arch_of(query.device)}"
    if mask.bias is not None:
        return _reason_against_bias(query, mask)
    if not as_bias and torch.compiler.is_compiling():
        if mask.key_padding is not None:
            return "padding lengths of many rows, which cannot be read while compiling"
        if mask.causal and isinstance(mask.offset, Tensor):
            return "many rows with an offset held in a tensor, which cannot be read while compiling"
    return None


def on_device_as_bias(query: Tensor, mask: Mask) -> bool:
    """Whether a GPU computes this call with a mask tensor: few rows, so that nothing is read from the device."""
    in_tensors = mask.key_padding is not None or (mask.causal and isinstance(mask.offset, Tensor))
    return mask.bias is not None or (in_tensors and query.shape[2] <= FOLDED_ROWS)


def _reason_against_bias(query: Tensor, mask: Mask) -> str | None:
    assert mask.bias is not None
    if mask.bias.requires_grad:
        return "a float mask that needs a gradient"
    if mask.causal or mask.key_padding is not None:
        return "a mask tensor on top of a structured mask"
    return "a mask tensor off the CPU" if query.device.type == "meta" else None


def aten(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, softcap: float | None, dropout: float
) -> Partial:
    """See `kernels.attend`. A mask is split into square causal and full parts, whose results are merged.

    Raises:
        NotImplementedError: the operators cannot compute this call; the message gives the reason of `reason_against`.
    """
    reason = reason_against(query, key, value, mask, softcap, dropout)
    if reason is not None:
        raise NotImplementedError(f"kernel 'aten' cannot do {reason}: use kernel=None, or 'cpu_tiled' on a CPU.")
    rows, num_keys = query.shape[2], key.shape[2]
    if mask.bias is not None:
        return _biased(query, key, value, mask.bias, scale)
    if on_gpu(query) and on_device_as_bias(query, mask):
        return _few_rows(query, key, value, mask, scale)
    if mask.key_padding is not None:
        return _padded(query, key, value, mask, scale)
    if not mask.causal:
        return _full(query, key, value, scale)
    start = mask.start(rows, num_keys)
    if start < 0:  # rows before the first key
        head = Partial.empty(query[:, :, :-start], value.shape[-1])
        tail = aten(query[:, :, -start:], key, value, mask.replace(offset=0), scale, None, 0.0)
        return Partial.cat([head, tail])
    if start + rows > num_keys:  # the last rows see every key
        inside = max(0, num_keys - start)
        tail = _full(query[:, :, inside:], key, value, scale)
        if not inside:
            return tail
        head = aten(query[:, :, :inside], key, value, mask.replace(offset=start), scale, None, 0.0)
        return Partial.cat([head, tail])
    square = _flash(query, key[:, :, start:], value[:, :, start:], True, scale)
    if start == 0:
        return square
    return merge([_full(query, key[:, :, :start], value[:, :, :start], scale), square])


def on_gpu(tensor: Tensor) -> bool:
    """Whether PyTorch's operators for GPUs compute what lies here; tests of them on a CPU replace this function."""
    return tensor.device.type not in ("cpu", "meta")


def _few_rows(query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float) -> Partial:
    """Few rows under padding or an offset held in a tensor, as one call with a mask tensor; nothing waits for the GPU.

    Heads that share keys become rows of one head, so that no key is repeated.
    """
    heads, rows = query.shape[1:3]
    t, s = torch.arange(rows, device=query.device), torch.arange(key.shape[2], device=query.device)
    if mask.causal:
        offset = key.shape[2] - rows if mask.offset is None else mask.offset
        seen = (s[None] <= t[:, None] + offset)[None, None]
    else:
        seen = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=query.device)
    if mask.key_padding is not None:
        seen = seen & mask.key_padding[:, None, None]
    group_size = heads // key.shape[1]
    if seen.shape[2] > 1:
        seen = seen.repeat(1, 1, group_size, 1)
    return _folded(query, key, value, scale, lambda q, k, v, *_: _biased(q, k, v, seen, scale))


def _full(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Partial:
    pays = folding_pays(query, key)
    return _folded(query, key, value, scale, _flash) if pays else _flash(query, key, value, False, scale)


def folding_pays(query: Tensor, key: Tensor) -> bool:
    """Whether heads that share keys should become rows of one head, where every row sees every key."""
    (batch, heads, rows, _), kv_heads = query.shape, key.shape[1]
    if heads == kv_heads or not 0 < rows <= FOLDED_ROWS:
        return False
    if query.dtype == torch.bfloat16:
        return not (heads // kv_heads * rows < FOLDED_FROM and query.is_cpu and _multiplies_by_amx())
    # Each thread gets whole heads. Folded heads may leave threads idle: then a float32 row per head is faster.
    return not (rows == 1 and query.dtype == torch.float32 and batch * kv_heads % _threads() and not on_gpu(query))


def _folded(query: Tensor, key: Tensor, value: Tensor, scale: float, operator: Callable[..., Any]) -> Partial:
    """Heads that share keys as rows of one head: (B, Hkv, group_size * T, D). They must see the same keys."""
    batch, heads, rows, head_dim = query.shape
    shape = (batch, key.shape[1], heads // key.shape[1] * rows, head_dim)
    out, lse = operator(query.reshape(shape), key, value, False, scale, None)
    return Partial(out.reshape(batch, heads, rows, -1), lse.reshape(batch, heads, rows))


@torch.compiler.assume_constant_result
def _multiplies_by_amx() -> bool:
    return cpu_has_kept("amx_tile")


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
    if not contiguous or (rows <= FOLDED_ROWS and not mask.causal):
        bias = torch.where(real, 0.0, -torch.inf).to(query.dtype)[:, None, None]
        if mask.causal:
            t, s = torch.arange(rows, device=real.device), torch.arange(num_keys, device=real.device)
            bias = bias.masked_fill(
                ~mask.replace(key_padding=None).visible(t, s, mask.start(rows, num_keys)), -torch.inf
            )
        return _biased(query, key, value, bias, scale)
    parts = []
    plain = mask.replace(key_padding=None)
    for b, (end, count) in enumerate(zip(ends, counts, strict=True)):
        one = slice(b, b + 1)
        parts.append(_run_of_keys(query[one], key[one], value[one], plain, end - count, end, scale))
    return Partial.cat(parts, dim=0)


def _run_of_keys(q: Tensor, k: Tensor, v: Tensor, mask: Mask, first: int, end: int, scale: float) -> Partial:
    """One row of the batch whose real keys are first..end; causal rows at or after `end` see all of these keys."""
    if not mask.causal:
        return aten(q, k[:, :, first:end], v[:, :, first:end], mask, scale, None, 0.0)
    rows, start = q.shape[2], mask.start(q.shape[2], k.shape[2])
    inside = min(rows, max(0, end - start))
    parts = []
    if inside:
        causal, stop = mask.replace(offset=start - first), start + inside
        parts.append(aten(q[:, :, :inside], k[:, :, first:stop], v[:, :, first:stop], causal, scale, None, 0.0))
    if inside < rows:
        parts.append(_full(q[:, :, inside:], k[:, :, first:end], v[:, :, first:end], scale))
    return Partial.cat(parts)


def _biased(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> Partial:
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    if bias.dtype == torch.bool:
        seen = bias
        bias = torch.where(bias, 0.0, -torch.inf).to(query.dtype)
    else:
        seen = bias > -torch.inf
    some = seen.any(-1)
    if on_gpu(query):
        # The operators for GPUs give NaN where a row sees no key: such a row sees all of them here, and is emptied
        # below, where its gradients become 0.
        part = _flash(query, key, value, False, scale, bias.masked_fill(~some.unsqueeze(-1), 0))
        return Partial(part.out.masked_fill(~some.unsqueeze(-1), 0), part.lse.masked_fill(~some, -torch.inf))
    part = _flash(query, key, value, False, scale, bias.to(query.dtype))
    # The operator returns lse 0 for rows that see no key.
    return Partial(part.out, part.lse.masked_fill(~some, -torch.inf))


def _flash(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, bias: Tensor | None = None
) -> Partial:
    """One operator call with a full or a square causal mask; the smaller of D and Dv is padded with zeros."""
    head_dim, head_dim_v = query.shape[-1], value.shape[-1]
    if query.numel() == 0 or key.numel() == 0:  # the operators divide by these sizes
        return Partial.empty(query, head_dim_v)
    if on_gpu(query) or query.device.type == "meta":
        return Partial(*gpu.fused(query, key, value, is_causal, scale, bias))
    if head_dim != head_dim_v:
        width = max(head_dim, head_dim_v)
        query, key, value = (F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    if needs_gradient(query, key, value):
        out, lse = FlashCPU.apply(query, key, value, is_causal, scale, bias)
    else:
        out, lse = flash_cpu(query, key, value, is_causal, scale, bias)
    return Partial(out if head_dim == head_dim_v else out[..., :head_dim_v], lse)
