"""Dropout in the compiled kernels: equal scores and one-hot values show which weights are kept; then the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.kernels.cpu_fused import build
from hf_attn_plugins.testing import assert_close_to_reference, sharp_inputs, visibility
from tests.kernels.fused_cases import Kind, allowing, kinds

KINDS = kinds(("bfloat16", "float32"))
pytestmark = pytest.mark.skipif(not KINDS, reason=f"cpu_fused: {build.unavailable(torch.float32)}")
BATCH, HEADS, KEYS = 2, 4, 208  # as many keys as a value has elements
P = 0.3


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind.instructions}-{str(kind.dtype)[6:]}")
def kind(request) -> Kind:
    with allowing(request.param.instructions):
        yield request.param


def kept(rows: int, dtype: torch.dtype, seed: int = 3) -> Tensor:
    """(B, H, T, S) bool: the weights that a call keeps after `torch.manual_seed(seed)`."""
    nothing = torch.zeros(BATCH, HEADS, max(rows, KEYS), 16, dtype=dtype)
    values = torch.eye(KEYS, dtype=dtype).expand(BATCH, HEADS, KEYS, KEYS)
    torch.manual_seed(seed)
    return attend(nothing[:, :, :rows], nothing[:, :, :KEYS], values, dropout=P, kernel="cpu_fused").out > 0


def dense(q, k, v, bias, keep, visible, softcap):
    """Plain attention with some weights dropped after the softmax; its lse is that of all weights."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    scores = (scores + bias).masked_fill(~visible, -torch.inf)
    return (scores.softmax(-1) * keep / (1 - P)) @ v, scores.logsumexp(-1)


@pytest.mark.parametrize("rows, softcap", [(97, None), (40, 8.0)])
def test_out_and_gradients(kind, rows, softcap):
    inputs = sharp_inputs(BATCH, HEADS, 2, rows, KEYS, 32, 48, dtype=kind.dtype)
    bias = torch.randn(1, HEADS, rows, KEYS)
    visible, keep = visibility(rows, KEYS, is_causal=True), kept(rows, kind.dtype)
    grads = torch.randn(BATCH, HEADS, rows, 48), torch.randn(BATCH, HEADS, rows)

    def ours(q, k, v, bias):
        torch.manual_seed(3)
        mask = Mask(causal=True, bias=bias if softcap is None else bias.detach())
        return attend(q, k, v, mask=mask, softcap=softcap, dropout=P, kernel="cpu_fused")

    def run(function, dtype):
        leaves = [x.to(dtype or x.dtype).detach().requires_grad_() for x in (*inputs, bias)]
        out, lse = function(*leaves)
        loss = (out * grads[0].to(out.dtype)).sum() + (lse * grads[1].to(lse.dtype)).sum()
        return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves if softcap is None else leaves[:3])]

    def plain(*x):
        return dense(*x, keep, visible, softcap)

    for got, low, ref in zip(run(ours, None), run(plain, kind.dtype), run(plain, torch.float64), strict=True):
        assert_close_to_reference(got, low.to(got.dtype), ref, 3.0)


def test_what_is_kept_looks_random_and_follows_from_the_seed(kind):
    keep = kept(KEYS, kind.dtype)
    assert torch.equal(keep, kept(KEYS, kind.dtype)) and not torch.equal(keep, kept(KEYS, kind.dtype, 4))
    share, places = keep.double() - (1 - P), keep.numel()
    spread = P * (1 - P)
    assert abs(share.mean()) < 5 * (spread / places) ** 0.5
    neighbours = {"rows": share[:, :, 1:] * share[:, :, :-1], "keys": share[..., 1:] * share[..., :-1],
                  "heads": share[:, 1:] * share[:, :-1], "batch": share[1:] * share[:-1]}  # fmt: skip
    for name, products in neighbours.items():
        assert abs(products.mean()) < 5 * spread / products.numel() ** 0.5, name
    for axis in (-1, -2):  # no row and no key is dropped more often than chance allows
        assert (share.mean(axis).abs() < 6 * (spread / KEYS) ** 0.5).all()


@pytest.mark.parametrize("compiled", [False, True])
def test_backward_drops_what_forward_dropped(kind, compiled):
    nothing = torch.zeros(BATCH, HEADS, KEYS, 16, dtype=kind.dtype)
    values = torch.eye(KEYS, dtype=kind.dtype).expand(BATCH, HEADS, KEYS, KEYS).contiguous().requires_grad_()

    def function(values):
        return attend(nothing, nothing, values, dropout=P, kernel="cpu_fused").out

    out = (torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function)(values)
    grad = torch.randn(out.shape).to(out.dtype)
    (got,) = torch.autograd.grad(out, values, grad)
    assert 0.6 < (out > 0).double().mean() < 0.8
    expected = out.detach().double().mT @ grad.double()
    assert torch.allclose(got.double(), expected, rtol=0.02, atol=0.02)


def test_pieces_of_a_plan_drop_what_the_whole_call_drops(kind):
    from hf_attn_plugins.core.rectangle import Rectangle
    from hf_attn_plugins.kernels.attend_rectangles import attend_rectangles

    inputs = sharp_inputs(BATCH, HEADS, 2, KEYS, KEYS, 32, dtype=kind.dtype, sharpness=1.0)
    plan = [Rectangle(0, KEYS, 0, 100), Rectangle(0, KEYS, 100, KEYS)]
    torch.manual_seed(3)
    whole = attend(*inputs, dropout=P, kernel="cpu_fused")
    torch.manual_seed(3)
    parts = attend_rectangles(*inputs, plan, dropout=P, kernel="cpu_fused")
    rounding = {torch.bfloat16: 0.02, torch.float16: 0.0025, torch.float32: 1e-5}[kind.dtype]
    assert torch.allclose(whole.out.float(), parts.out.float(), atol=rounding)
