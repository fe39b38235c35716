"""The compiled CPU kernels under every instruction set of this CPU: which there are, and one check of a call."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.kernels.attend_rectangles import attend_rectangles
from hf_attn_plugins.kernels.cpu_fused import build
from hf_attn_plugins.kernels.cpu_fused.instruction_sets import SETS, VARIABLE, allowed, best
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention, sharp_inputs

FEW = 32  # rows, below which the worst error of plain attention is a matter of luck


class Kind(NamedTuple):
    """An instruction set and how the tensors are stored."""

    instructions: str
    dtype: torch.dtype


def kinds(folders: tuple[str, ...] = ("float32",)) -> list[Kind]:
    """What this CPU runs and a compiler can be had for, of the sources in some folders."""
    return [
        Kind(one.name, dtype)
        for one in SETS
        if one.folder in folders
        for dtype in one.dtypes
        if best(dtype, one.name) == one and build._state(one.name)[1] is None
    ]


@contextlib.contextmanager
def allowing(instructions: str) -> Iterator[None]:
    """No instruction set above this one is used inside. The package reads the variable once: it forgets."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = instructions
    allowed.cache_clear()
    try:
        yield
    finally:
        os.environ.pop(VARIABLE)
        os.environ |= {} if before is None else {VARIABLE: before}
        allowed.cache_clear()


def losses(
    function: Callable, inputs: tuple[Tensor, ...], dtype: torch.dtype | None, seen: Tensor, grads: tuple
) -> tuple:
    """out, lse and the gradients of both, weighted with `grads`; rows that see nothing give no gradient of the lse.

    `dtype` None leaves every input as it is.
    """
    leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in inputs]
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
    rounding = 0.25 * torch.finfo(torch.float32).eps * float(grad_out.abs().sum(-1).max() * value.max())
    if which == "bias":
        return rounding
    other = float((key if which == "query" else query).max())
    return rounding * other * (query.shape[-1] ** -0.5 if scale is None else scale)


def split(visible: Tensor, bias: Tensor) -> tuple[Tensor, Tensor | None]:
    """What a mask tensor hides, as part of `visible`, and what it adds."""
    if bias.dtype == torch.bool:
        return visible & bias, None
    return visible & (bias > -torch.inf), bias


def check_call(
    inputs: tuple[Tensor, ...],
    mask: Mask,
    visible: Tensor,
    plan: list[list[Rectangle]] | None = None,
    scale: float | None = None,
    seed: int = 0,
    luck: float = 1.0,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> None:
    """out, lse and gradients of `cpu_fused` obey the error rule against float64; rows that see nothing are empty.

    Args:
        luck: factor of the rule's limits. In random cases of a few float32 numbers, the plain computation, by whose
            worst error the rule measures, is sometimes exact by chance: 3 there, and one rounding of the largest score
            in the lse and in the weights.
        bias: bool, or float with or without `requires_grad`: then its gradient is checked too. `mask` has none.
    """
    query, _, value = inputs
    shape = query.shape[:3]
    options: dict = {"scale": scale, "softcap": softcap}
    visible, added = (visible, None) if bias is None else split(visible, bias)
    seen = visible.any(-1).expand(shape)
    generator = torch.Generator().manual_seed(seed)
    grads = (
        torch.randn(*shape, value.shape[-1], generator=generator, dtype=torch.float64),
        torch.randn(shape, generator=generator, dtype=torch.float64),
    )

    def ours(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = bias) -> Partial:
        run = attend if plan is None else functools.partial(attend_rectangles, plan=plan)
        return run(q, k, v, mask=mask.replace(bias=bias), kernel="cpu_fused", **options)

    def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = added) -> tuple[Tensor, Tensor]:
        bias = bias if bias is None else bias.to(q.dtype).masked_fill(bias == -torch.inf, 0)
        return dense_attention(q, k, v, visible=visible, bias=bias, **options)

    leaves = (*inputs, bias) if bias is not None and bias.requires_grad else inputs
    out, lse, got = losses(ours, leaves, None, seen, grads)
    ref_out, ref_lse, ref = losses(dense, leaves, torch.float64, seen, grads)
    low_out, low_lse, low = losses(dense, leaves, query.dtype, seen, grads)
    factor = 2.0 if softcap is None else 3.0
    assert (out[~seen] == 0).all(), "rows without keys must be 0"
    calm_out, calm_lse = ours(*inputs)  # without gradients, a few rows are decoded
    assert torch.equal(calm_lse == -torch.inf, ~seen), "rows are empty exactly where they see nothing"
    largest = float(ref_lse.abs().max()) if luck > 1 else 0.0
    calm_lse = calm_lse.masked_fill(~seen, 0)
    for name, part_out, part_lse in (("", out, lse), (" without gradients", calm_out, calm_lse)):
        assert_close_to_reference(part_out, low_out, ref_out, factor * luck, "out" + name)
        if not torch.allclose(part_lse.double(), ref_lse, rtol=0, atol=torch.finfo(part_lse.dtype).eps * largest):
            assert_close_to_reference(part_lse, low_lse, ref_lse, 3.0 * luck, "lse" + name)
    for which, one, other, reference in zip(("query", "key", "value", "bias"), got, low, ref, strict=False):
        spare = cancelled(inputs, grads[0], which, scale) if luck > 1 or shape[2] < FEW else 0.0
        other = other.to(one.dtype)  # a bias may have another dtype than the query
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


def drawn_changes(seed: int, inputs: tuple[Tensor, ...]) -> dict:
    """A random softcap and mask tensor for the inputs of `drawn`: every dtype, broadcast along any dimension, strided,
    with rows that it hides whole, with and without a gradient; often none."""
    generator = torch.Generator().manual_seed(10_000 + seed)

    def pick(*choices):
        return choices[int(torch.randint(len(choices), (), generator=generator))]

    softcap = pick(None, None, 4.0, 50.0)
    if pick(True, False, False):
        return {"softcap": softcap}
    (batch, heads, rows, _), keys = inputs[0].shape, inputs[1].shape[2]
    shape = (pick(1, batch), pick(1, heads), pick(1, rows, rows), pick(1, keys, keys, keys))
    density = pick(0.2, 0.9, 1.0)
    real = torch.rand(shape, generator=generator) < density
    bias = 3 * torch.randn(shape, generator=generator)
    dtype = pick(torch.bool, torch.float32, torch.bfloat16, torch.float16)
    bias = real if dtype == torch.bool else bias.masked_fill(~real, -torch.inf).to(dtype)
    if pick(True, False):
        bias = bias.mT.contiguous().mT  # neighbours are rows
    elif pick(True, False):
        bias = torch.cat([bias, bias], -1)[..., : shape[-1]]  # rows apart
    whole = shape[2:] == (rows, keys) and softcap is None and dtype != torch.bool
    return {"softcap": softcap, "bias": bias.requires_grad_() if whole and pick(True, False) else bias}
