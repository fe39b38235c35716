"""`hf-attn bench gpu`, first part: results of every feature on the GPU, compared with float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask, padding_from_lengths
from hf_attn_plugins.kernels.attend import attend
from hf_attn_plugins.kernels.attend_rectangles import attend_rectangles
from hf_attn_plugins.star.plan import Plan
from hf_attn_plugins.star.rectangles import rectangles_of
from hf_attn_plugins.testing import allowed_error, dense_attention

LENGTH, HEADS = 1000, (8, 2)


class Feature(NamedTuple):
    """A call to check: rows of `LENGTH` keys (0 for as many), head_dim, softcap, its mask, made on the device, and
    whether it is star's plan, as rectangles in one launch where the kernel can."""

    rows: int
    head_dim: int
    softcap: float | None
    mask: Callable[[int, torch.device], Mask]
    is_plan: bool = False


def _padded(side: str) -> Callable[[int, torch.device], Mask]:
    def make(length: int, device: torch.device) -> Mask:
        lengths = torch.tensor([length, length // 3], device=device)
        return Mask(causal=True, key_padding=padding_from_lengths(lengths, length, side))

    return make


def _packed(length: int, device: torch.device) -> Mask:
    own = torch.arange(length, device=device).mul(5).div(length, rounding_mode="floor").expand(2, length)
    return Mask(causal=True, query_segments=own, key_segments=own)


def _offset_in_tensor(length: int, device: torch.device) -> Mask:
    return Mask(causal=True, offset=torch.tensor(length * 7 // 10, device=device))


FEATURES = {
    "causal": Feature(0, 128, None, lambda n, d: Mask(causal=True)),
    "full, head_dim 64": Feature(0, 64, None, lambda n, d: Mask()),
    "decode": Feature(1, 128, None, lambda n, d: Mask(causal=True)),
    "decode, 5 rows, offset in a tensor": Feature(5, 64, None, _offset_in_tensor),
    "right padding": Feature(0, 128, None, _padded("right")),
    "left padding": Feature(0, 64, None, _padded("left")),
    "head_dim 96": Feature(0, 96, None, lambda n, d: Mask(causal=True)),
    "head_dim 256": Feature(0, 256, None, lambda n, d: Mask(causal=True)),
    "window": Feature(0, 128, None, lambda n, d: Mask(causal=True, window=(n // 5, None))),
    "segments": Feature(0, 128, None, _packed),
    "prefix": Feature(0, 64, None, lambda n, d: Mask(causal=True, prefix=n // 13)),
    "softcap": Feature(0, 128, 20.0, lambda n, d: Mask(causal=True)),
    "star's plan": Feature(0, 128, None, lambda n, d: Mask(causal=True), True),
    "star's plan, softcap": Feature(0, 64, 20.0, lambda n, d: Mask(causal=True), True),
}


def star_plan(length: int) -> Plan:
    """Five blocks, an anchor and a query."""
    return Plan(length, max(1, length // 5), length // 11, length // 9)


def check(
    name: str, dtype: torch.dtype, kernel: str | None, device: torch.device, length: int = LENGTH,
    heads: tuple[int, int] = HEADS,
) -> dict[str, Any]:  # fmt: skip
    """Errors of out and gradients from float64, and what the error rule allows.

    Args:
        name: of `FEATURES`.
        kernel: by name; None checks what a user gets by default.

    Returns:
        {"right": bool, "errors": {"out": [error, allowed], "dq": ..., ...}}.
    """
    feature = FEATURES[name]
    mask, rows = feature.mask(length, device), feature.rows or length
    generator = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float64)

    shapes = ((heads[0], rows), (heads[1], length), (heads[1], length))
    query, key, value = (draw(2, h, n, feature.head_dim) for h, n in shapes)
    inputs, weight = [x.to(dtype) for x in (2 * query, 2 * key, value)], draw(2, heads[0], rows, feature.head_dim)
    t, s = torch.arange(rows, device=device), torch.arange(length, device=device)
    seen = mask.visible(t, s, mask.start(rows, length), 2)
    plan = star_plan(length) if feature.is_plan else None
    if plan is not None:
        seen = torch.tensor([[plan.may_attend(i, j) for j in range(length)] for i in range(length)], device=device)
    results = []
    for kind in (torch.float64, dtype, None):
        leaves = [x.to(kind or dtype).detach().requires_grad_() for x in inputs]
        if kind is None:
            options: dict[str, Any] = {"mask": mask, "softcap": feature.softcap, "kernel": kernel}
            if plan is None:
                out = attend(*leaves, **options).out
            else:
                out = attend_rectangles(leaves[0], leaves[1], leaves[2], rectangles_of(plan), **options).out
        else:
            out = dense_attention(leaves[0], leaves[1], leaves[2], seen, softcap=feature.softcap)[0]
        results.append([out.detach(), *torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)])
    errors, right = {}, True
    for which, ref, low, ours in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        factor = 3.0 if which != "out" or feature.softcap else 2.0
        error, limit = float((ours.double() - ref).abs().max()), allowed_error(low, ref, factor)
        right &= error <= limit
        errors[which] = [error, limit]
    return {"right": right, "errors": errors}


def as_line(name: str, found: dict[str, Any]) -> str:
    """The result of one check, "right: ..." or "WRONG: ..."."""
    words = [f"{which} {error:.1e} (allowed {limit:.1e})" for which, (error, limit) in found["errors"].items()]
    return f"{'right' if found['right'] else 'WRONG'}: {name}: {', '.join(words)}"
