"""The kernel "flex": PyTorch's FlexAttention, compiled, for masks that PyTorch's fused operators do not know.

On a CPU, where only a call that names the kernel comes here, FlexAttention runs uncompiled with the whole score matrix:
that checks the masks, and is no way to compute long sequences.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn_plugins.core.compat import block_mask_of, flex_attention
from hf_attn_plugins.core.gradient import needs_gradient
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.kernels.flex.blocks import TILE, tiles_of
from hf_attn_plugins.kernels.segment_labels import HIDDEN, Labels, make_labels

LEAST_HEAD_DIM, MOST_HEAD_DIM = 16, 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INSTALLED = importlib.util.find_spec("triton") is not None
OFF = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")  # PyTorch's own switches: uncompiled, it would make all scores

Pairs = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]

_failed: list[str] = []  # global state: why it is off in this process, see `turn_off`


class Failed(RuntimeError):
    """FlexAttention could not be compiled or run; the message holds what it said."""


def turn_off(why: str) -> None:
    """Let no call of this process choose FlexAttention any more."""
    _failed.append(why)


def reason_against(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float
) -> str | None:
    """Why `flex` cannot compute this call; None when it can."""
    if _failed:
        return f"anything in this process: {_failed[0]}"
    if torch.compiler.is_compiling():
        return "calls in a traced graph"
    on_gpu = query.device.type == "cuda"
    if on_gpu and not INSTALLED:
        return "anything, because Triton is not installed (pip install 'hf-attn-plugins[triton]')"
    if on_gpu and any(os.environ.get(name) == "1" for name in OFF):
        return "anything, because torch.compile is switched off"
    if query.device.type not in ("cuda", "cpu"):
        return f"tensors on {query.device.type}"
    if dropout:
        return "dropout"
    if query.dtype not in DTYPES and on_gpu:
        return f"{query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > MOST_HEAD_DIM:
        return f"a head_dim above {MOST_HEAD_DIM}"
    if mask.bias is not None and mask.bias.requires_grad:
        return "a float mask that needs a gradient"
    if not on_gpu and needs_gradient(query, key, value):
        return "gradients on a CPU"
    return None


def flex(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, softcap: float | None, dropout: float
) -> Partial:
    """See `kernels.attend`. Extra memory: a list of tiles, 8 bytes per tile of 128 x 128 scores.

    Raises:
        NotImplementedError: the kernel cannot compute this call; the message gives the reason of `reason_against`.
        Failed: FlexAttention could not be compiled.

    Source: FlexAttention, arXiv 2412.05496.
    """
    reason = reason_against(query, key, value, mask, softcap, dropout)
    if reason is not None:
        raise NotImplementedError(f"kernel 'flex' cannot do {reason}: use kernel=None to choose another.")
    (batch, heads, rows, head_dim), (_, kv_heads, keys, head_dim_v) = query.shape, value.shape
    if 0 in (batch, rows, keys, head_dim_v):
        return Partial.empty(query, head_dim_v)
    width = max(LEAST_HEAD_DIM, 1 << (max(head_dim, head_dim_v) - 1).bit_length())
    query, key, value = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (query, key, value))
    labels = make_labels(mask.key_padding, mask.query_segments, mask.key_segments)
    seen = pairs_seen(mask, labels, rows, keys, query.device)
    tiles = tiles_of(mask, labels, rows, keys, query.device)
    run = flex_attention(query.device.type != "cpu")
    try:
        out, lse = run(
            query, key, value, scores_of(mask, softcap, query), block_mask_of(tiles, TILE, seen, (rows, keys)), scale,
            heads != kv_heads,
        )  # fmt: skip
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler raises
        raise Failed(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from error
    return Partial(out[..., :head_dim_v], lse)  # rows without keys: 0 and -inf


def pairs_seen(mask: Mask, labels: Labels | None, rows: int, keys: int, device: torch.device) -> Pairs:
    """The mask as a function of one pair, (b, h, row, key) -> bool, as FlexAttention calls it.

    Numbers are elements of a tensor: as integers of Python, each new offset would be compiled anew.
    """
    causal, (left, right), prefix, predicate = mask.causal, mask.window, mask.prefix, mask.predicate
    numbers = _numbers((left or 0, right or 0, prefix, keys - rows), device)
    offset = numbers[3] if mask.offset is None else _offset(mask.offset, device)
    row_labels, key_labels = (None, None) if labels is None else labels
    bias = _four(mask.bias) if mask.bias is not None and mask.bias.dtype == torch.bool else None

    def seen(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        distance = key - row - offset
        found = key >= 0
        if causal:
            found = found & (distance <= 0)
        if left is not None:
            found = found & (distance >= -numbers[0])
        if right is not None:
            found = found & (distance <= numbers[1])
        if prefix:
            found = found | (key < numbers[2])
        if key_labels is not None:
            label = key_labels[_at(key_labels, 0, b), key]
            own = 0 if row_labels is None else row_labels[_at(row_labels, 0, b), row]
            found = found & (label == own) & (label != HIDDEN)
        if predicate is not None:
            found = found & predicate(b, h, row + offset, key)
        if bias is not None:
            found = found & bias[_at(bias, 0, b), _at(bias, 1, h), _at(bias, 2, row), _at(bias, 3, key)]
        return found

    return seen


def scores_of(mask: Mask, softcap: float | None, query: Tensor) -> Callable[..., Tensor] | None:
    """Softcap and float bias as FlexAttention's score function; None where there is neither."""
    bias = _four(mask.bias.detach()) if mask.bias is not None and mask.bias.dtype != torch.bool else None
    if softcap is None and bias is None:
        return None
    cap = None if softcap is None else _cap(softcap, query.device)

    def score(value: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        if cap is not None:
            value = cap * torch.tanh(value / cap)
        if bias is not None:
            value = value + bias[_at(bias, 0, b), _at(bias, 1, h), _at(bias, 2, row), _at(bias, 3, key)]
        return value

    return score


def _at(tensor: Tensor, dim: int, index: Tensor) -> Tensor | int:
    return index if tensor.shape[dim] > 1 else 0


def _four(tensor: Tensor) -> Tensor:
    return tensor.reshape((1,) * (4 - tensor.ndim) + tensor.shape)


def _offset(offset: int | Tensor, device: torch.device) -> Tensor:
    return offset.to(device) if isinstance(offset, Tensor) else _numbers((offset,), device)[0]


@functools.lru_cache(maxsize=256)
def _numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=16)
def _cap(softcap: float, device: torch.device) -> Tensor:
    return torch.tensor(softcap, dtype=torch.float32, device=device)
