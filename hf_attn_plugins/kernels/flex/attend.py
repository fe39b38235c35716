"""The kernel "flex": PyTorch's FlexAttention, compiled, for masks and plans that PyTorch's fused operators do not know.

On a CPU, where only a call that names the kernel comes here, FlexAttention runs uncompiled with the whole score matrix:
that checks the masks, and is no way to compute long sequences.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn_plugins.core.compat import block_mask_of, flex_attention
from hf_attn_plugins.core.gradient import needs_gradient
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.kernels.flex import plan as plans
from hf_attn_plugins.kernels.flex.blocks import tiles_of
from hf_attn_plugins.kernels.flex.pairs import pairs_seen, scores_of
from hf_attn_plugins.kernels.flex.plan import TILE
from hf_attn_plugins.kernels.segment_labels import make_labels

LEAST_HEAD_DIM, MOST_HEAD_DIM = 16, 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GPUS = ("cuda", "xpu")  # where PyTorch compiles FlexAttention with the lse; chosen by itself on CUDA and ROCm only
INSTALLED = importlib.util.find_spec("triton") is not None
OFF = ("TORCHDYNAMO_DISABLE", "TORCH_COMPILE_DISABLE")  # PyTorch's own switches: uncompiled, it would make all scores

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
    on_gpu = query.device.type in GPUS
    if on_gpu and not INSTALLED:
        return "anything, because Triton is not installed (pip install 'hf-attn-plugins[triton]')"
    if on_gpu and any(os.environ.get(name) == "1" for name in OFF):
        return "anything, because torch.compile is switched off"
    if not on_gpu and query.device.type != "cpu":
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
    return flex_rectangles(query, key, value, mask, scale, softcap, dropout, [])


def flex_rectangles(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, softcap: float | None, dropout: float,
    plan: list[list[Rectangle]],
) -> Partial:  # fmt: skip
    """`flex` over the rectangles of `plan` alone, in one launch.

    Args:
        plan: one list of rectangles per row of the batch, or one list for all; [] means every pair.
        query, key, value, mask, scale, softcap, dropout: as in `kernels.attend`.

    Raises:
        NotImplementedError: as `flex`; also for rectangles that share pairs, and a plan of very many small ones.
        Failed: as `flex`.
    """
    (batch, heads, rows, head_dim), (_, kv_heads, keys, head_dim_v) = query.shape, value.shape
    reason = reason_against(query, key, value, mask, softcap, dropout) or plans.reason_against_plan(plan, rows)
    if reason is not None:
        raise NotImplementedError(f"kernel 'flex' cannot do {reason}: use kernel=None to choose another.")
    if 0 in (batch, rows, keys, head_dim_v):
        return Partial.empty(query, head_dim_v)
    width = max(LEAST_HEAD_DIM, 1 << (max(head_dim, head_dim_v) - 1).bit_length())
    query, key, value = (F.pad(x, (0, width - x.shape[-1])) if x.shape[-1] < width else x for x in (query, key, value))
    run = flex_attention(query.device.type != "cpu")
    try:
        visited = _visited(mask, rows, keys, query.device, plan)
        out, lse = run(query, key, value, scores_of(mask, softcap, query), visited, scale, heads != kv_heads)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a compiler raises
        raise Failed(" ".join(f"{type(error).__name__}: {error}".split())[:300]) from error
    return Partial(out[..., :head_dim_v], lse)  # rows without keys: 0 and -inf


def _visited(mask: Mask, rows: int, keys: int, device: torch.device, plan: list[list[Rectangle]]) -> Any:
    """FlexAttention's `BlockMask` of a mask and a plan; kept where nothing but integers decides."""
    if not plan:
        labels = make_labels(mask.key_padding, mask.query_segments, mask.key_segments)
        tiles = tiles_of(mask, labels, rows, keys, device)
        return block_mask_of(tiles, TILE, pairs_seen(mask, labels, rows, keys, device), (rows, keys))
    places, which = plans.places_of(plan, mask, rows, keys)
    if mask.has_no_tensors():
        return _kept(places, which, device)
    return _of_plan(places, which, device, mask)


def _of_plan(places: plans.Places, which: tuple[int, ...], device: torch.device, mask: Mask) -> Any:
    mask = mask.replace(causal=False, window=(places.left, places.right), offset=places.start)
    labels = make_labels(mask.key_padding, mask.query_segments, mask.key_segments)
    plan, sizes = plans.plan_of(places, which, device), (places.rows, places.keys)
    tiles = tiles_of(mask, labels, *sizes, device, plan.tiles())
    return block_mask_of(tiles, TILE, pairs_seen(mask, labels, *sizes, device, plan), sizes)


@functools.lru_cache(maxsize=plans.MOST_KEPT)
def _kept(places: plans.Places, which: tuple[int, ...], device: torch.device) -> Any:
    with torch.inference_mode(False):  # a tensor of inference mode could not be kept for a later gradient
        return _of_plan(places, which, device, Mask(prefix=places.prefix))
