"""A small call with given features: what the self-test of the Triton kernels compares with PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn_plugins.core.gradient import needs_gradient
from hf_attn_plugins.core.mask import Mask, padding_from_lengths
from hf_attn_plugins.core.rectangle import Rectangle

ROWS, MORE_KEYS, DECODE_KEYS = 150, 47, 300  # two ragged tiles of rows, on most chips
BATCH, HEADS, KV_HEADS = 2, 4, 2
NEAR = 40  # keys of a window, and fewer than there are rows


class Trial(NamedTuple):
    """The features of a call, which decide what is compiled for it.

    Attributes:
        decode: whether the kernels for few rows compute it; backward: whether a gradient is needed.
        dtype: such as "bfloat16"; head_dim, head_dim_v: D and Dv.
        causal, left, right, prefix, tensor_offset, padding, segments, softcap, dropout, plan: whether the call has it.
        bias: "", "bool" or "float".
    """

    decode: bool
    backward: bool
    dtype: str
    head_dim: int
    head_dim_v: int
    causal: bool
    left: bool
    right: bool
    prefix: bool
    tensor_offset: bool
    padding: bool
    segments: bool
    bias: str
    softcap: bool
    dropout: bool
    plan: bool

    def words(self) -> str:
        """The features in words, such as "prefill, bfloat16, head_dim 128, causal, softcap"."""
        size = f"head_dim {self.head_dim}" + (f":{self.head_dim_v}" if self.head_dim_v != self.head_dim else "")
        flags = [name.replace("_", " ") for name in self._fields[5:] if getattr(self, name) is True]
        bias = [f"{self.bias} bias"] if self.bias else []
        kind = ("decode" if self.decode else "prefill") + (" and backward" if self.backward else "")
        return ", ".join([kind, self.dtype, size, *flags, *bias])


def trial_of(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float, plan: bool = False
) -> Trial:
    """The features of a call whose arguments are as in `choose.choose`; `plan`: it is a list of rectangles."""
    gradient = needs_gradient(query, key, value)
    bias = "" if mask.bias is None else "bool" if mask.bias.dtype == torch.bool else "float"
    return Trial(
        query.shape[2] <= 16 and not plan, gradient, str(query.dtype).removeprefix("torch."), query.shape[-1],
        value.shape[-1], mask.causal, mask.window[0] is not None, mask.window[1] is not None, mask.prefix > 0,
        isinstance(mask.offset, Tensor), mask.key_padding is not None, mask.query_segments is not None, bias,
        softcap is not None, dropout > 0, plan,
    )  # fmt: skip


def sizes(trial: Trial) -> tuple[int, int]:
    """Rows and keys of the small call."""
    return (3, DECODE_KEYS) if trial.decode else (ROWS, ROWS + MORE_KEYS)


def inputs(trial: Trial, rows: int, keys: int, device: torch.device) -> list[Tensor]:
    """Query, key and value, the same in every run; no random state of the process is read."""
    generator = torch.Generator(device).manual_seed(0)
    shapes = ((HEADS, rows, trial.head_dim), (KV_HEADS, keys, trial.head_dim), (KV_HEADS, keys, trial.head_dim_v))
    drawn = [torch.randn(BATCH, *shape, generator=generator, device=device) for shape in shapes]
    return [x.to(getattr(torch, trial.dtype)) for x in (2 * drawn[0], drawn[1], drawn[2])]


def masks(
    trial: Trial, rows: int, keys: int, device: torch.device
) -> tuple[Mask, list[list[Rectangle]], Tensor]:  # fmt: skip
    """The mask, the plan, and the pairs (B, 1, rows, keys) that both show."""
    offset, third = keys - rows, keys // 3
    t, s = torch.arange(rows, device=device), torch.arange(keys, device=device)
    padding = (
        padding_from_lengths(torch.tensor([keys, keys - third][-BATCH:], device=device), keys, "left")
        if trial.padding
        else None
    )
    bias = None
    if trial.bias:
        bias = (t[:, None] * 7 + s * 3) % 5 - 1.0
        bias = bias > 0 if trial.bias == "bool" else bias.to(getattr(torch, trial.dtype))
    mask = Mask(
        causal=trial.causal,
        window=(NEAR if trial.left else None, NEAR // 2 if trial.right else None),
        offset=torch.tensor(offset, device=device) if trial.tensor_offset else offset,
        prefix=9 if trial.prefix else 0,
        key_padding=padding,
        query_segments=((t + offset) // third).expand(BATCH, rows) if trial.segments else None,
        key_segments=(s // third).expand(BATCH, keys) if trial.segments else None,
        bias=bias,
    )
    seen = mask.visible(t, s, offset, BATCH)
    if not trial.plan:
        return mask, [], seen
    cut, middle = rows // 2, third
    plan = [Rectangle(0, cut, 0, keys, True), Rectangle(cut, rows, 0, middle), Rectangle(cut, rows, middle, keys, True)]
    everything = mask.replace(causal=False, window=(None, None)).visible(t, s, offset, BATCH)
    free = (t[:, None] >= cut) & (s < middle)
    return mask, [plan], torch.where(free, everything, seen)


def exact(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, softcap: float | None, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out and lse from the definition, with all scores; rows without keys give 0 and -inf."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.mT * query.shape[-1] ** -0.5
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = (scores if bias is None else scores + bias).masked_fill(~seen, -torch.inf)
    some = seen.any(-1, keepdim=True).expand(*scores.shape[:-1], 1)
    weights = torch.where(some, scores, 0).softmax(-1) * some
    return weights @ value, torch.where(some, scores, 0).logsumexp(-1).masked_fill(~some[..., 0], -torch.inf)
