"""The compiled CPU kernels under every instruction set of this CPU: which there are, and one check of a call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.kernels.attend_rectangles import attend_rectangles
from hf_attn_plugins.kernels.cpu_fused import build
from hf_attn_plugins.kernels.cpu_fused.instruction_sets import SETS, best
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention, sharp_inputs

FEW = 32  # rows, below which the worst error of plain attention is a matter of luck


class Kind(NamedTuple):
    """An instruction set of the folder `float32` and how the tensors are stored."""

    instructions: str
    dtype: torch.dtype


def kinds() -> list[Kind]:
    """What this CPU runs and a compiler can be had for."""
    return [
        Kind(one.name, dtype)
        for one in SETS
        if one.folder == "float32"
        for dtype in one.dtypes
        if best(dtype, one.name) == one and build._state(one.name)[1] is None
    ]


def losses(function: Callable, inputs: tuple[Tensor, ...], dtype: torch.dtype, seen: Tensor, grads: tuple) -> tuple:
    """out, lse and the gradients of both, weighted with `grads`; rows that see nothing give no gradient of the lse."""
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    out, lse = function(*leaves)
    lse = torch.where(seen.expand(lse.shape), lse, 0)
    loss = (out * grads[0].to(out.dtype)).sum() + (lse * grads[1].to(lse.dtype)).sum()
    return out.detach(), lse.detach(), torch.autograd.grad(loss, leaves)


def cancelled(inputs: tuple[Tensor, ...], grad_out: Tensor, which: str, scale: float | None) -> float:
    """Rounding of the terms that cancel in a gradient of the scores, P (dP - delta), for a few rows in float32.

    A row whose softmax is one key has the gradient 0. Plain attention gets exactly that. Where there are no other rows
    it leaves the error rule no room. What starts from the lse gets the rounding of dP and delta, times query or key.
    """
    query, key, value = (x.double().abs() for x in inputs)
    if which == "value" or inputs[0].dtype != torch.float32:
        return 0.0
    largest = float(grad_out.abs().sum(-1).max() * value.max() * (key if which == "query" else query).max())
    return 0.25 * torch.finfo(torch.float32).eps * largest * (query.shape[-1] ** -0.5 if scale is None else scale)


def check_call(
    inputs: tuple[Tensor, ...],
    mask: Mask,
    visible: Tensor,
    plan: list[list[Rectangle]] | None = None,
    scale: float | None = None,
    seed: int = 0,
    luck: float = 1.0,
) -> None:
    """out, lse and gradients of `cpu_fused` obey the error rule against float64; rows that see nothing are empty.

    Args:
        luck: factor of the rule's limits. In random cases of a few float32 numbers, the plain computation, by whose
            worst error the rule measures, is sometimes exact by chance: 3 there, and one rounding of the largest score
            in the lse and in the weights.
    """
    query, _, value = inputs
    shape = query.shape[:3]
    seen = visible.any(-1).expand(shape)
    generator = torch.Generator().manual_seed(seed)
    grads = (
        torch.randn(*shape, value.shape[-1], generator=generator, dtype=torch.float64),
        torch.randn(shape, generator=generator, dtype=torch.float64),
    )
    if plan is None:
        ours = functools.partial(attend, mask=mask, scale=scale, kernel="cpu_fused")
    else:
        ours = functools.partial(attend_rectangles, plan=plan, mask=mask, scale=scale, kernel="cpu_fused")
    dense = functools.partial(dense_attention, visible=visible, scale=scale)
    out, lse, got = losses(ours, inputs, query.dtype, seen, grads)
    ref_out, ref_lse, ref = losses(dense, inputs, torch.float64, seen, grads)
    low_out, low_lse, low = losses(dense, inputs, query.dtype, seen, grads)
    assert (out[~seen] == 0).all(), "rows without keys must be 0"
    calm_out, calm_lse = ours(*inputs)  # without gradients, a few rows are decoded
    assert torch.equal(calm_lse == -torch.inf, ~seen), "rows are empty exactly where they see nothing"
    largest = float(ref_lse.abs().max()) if luck > 1 else 0.0
    calm_lse = calm_lse.masked_fill(~seen, 0)
    for name, part_out, part_lse in (("", out, lse), (" without gradients", calm_out, calm_lse)):
        assert_close_to_reference(part_out, low_out, ref_out, 2.0 * luck, "out" + name)
        if not torch.allclose(part_lse.double(), ref_lse, rtol=0, atol=torch.finfo(part_lse.dtype).eps * largest):
            assert_close_to_reference(part_lse, low_lse, ref_lse, 3.0 * luck, "lse" + name)
    for which, one, other, reference in zip(("query", "key", "value"), got, low, ref, strict=True):
        spare = cancelled(inputs, grads[0], which, scale) if luck > 1 or shape[2] < FEW else 0.0
        if which == "value":  # a weight is off by half a rounding of its score
            spare = 0.5 * torch.finfo(torch.float32).eps * largest * float(grads[0].abs().max())
        if not torch.allclose(one.double(), reference, rtol=0, atol=spare):
            assert_close_to_reference(one, other, reference, 3.0 * luck, f"grad_{which}")


def drawn(seed: int, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], dict]:
    """Random inputs and fields of a mask: sizes around the tiles' edges, grouped heads, strided memory, every kind of
    mask and their combinations."""
    generator = torch.Generator().manual_seed(seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    def below(limit: int) -> int:
        return int(torch.randint(max(1, limit), (), generator=generator))

    rows = pick(1, 2, 5, 23, 24, 25, 31, 32, 47, 49, 95, 96, 97, 1 + below(230))
    keys = pick(1, 3, 24, 95, 96, 97, 191, 193, 577, 1 + below(400))
    batch, kv_heads, group = pick(1, 2), pick(1, 2, 3), pick(1, 2, 4)
    dim, dim_v = 16 * (1 + below(6)), 16 * (1 + below(6))
    inputs = sharp_inputs(batch, kv_heads * group, kv_heads, rows, keys, dim, dim_v, dtype=dtype, seed=seed,
                          sharpness=pick(0.3, 1.0, 3.0, 6.0))  # fmt: skip
    if pick(True, False):
        inputs = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
    fields: dict = {"is_causal": pick(True, False)}
    if pick(True, False, False):
        fields["window"] = (below(keys), pick(None, below(30)))
    if pick(True, False):
        fields["offset"] = below(keys + 20) - 10
    if pick(True, False, False):
        fields["prefix"] = below(keys + 1)
    count = pick(1, batch)
    if pick(True, False):
        fields["key_padding"] = torch.rand(count, keys, generator=generator) < pick(0.1, 0.5, 0.95)
    if pick(True, False, False):
        fields["query_segments"] = torch.randint(3, (count, rows), generator=generator).sort(-1).values
        fields["key_segments"] = torch.randint(3, (count, keys), generator=generator).sort(-1).values
    return inputs, fields
