"""Partial and merge against the plain formula in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_plugins.core.partial import Partial, merge, with_sinks
from hf_attn_plugins.testing import dense_attention, sharp_inputs


def pieces_of(query, key, value, cuts, visible=None):
    """Partials over consecutive runs of keys, straight from the definition."""
    visible = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool) if visible is None else visible
    bounds = [0, *cuts, key.shape[2]]
    return [
        Partial(*dense_attention(query, key[:, :, a:b], value[:, :, a:b], visible[..., a:b]))
        for a, b in itertools.pairwise(bounds)
    ]


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(1, 6))
def test_any_split_in_any_order_is_the_whole(data, count):
    query, key, value = sharp_inputs(2, 4, 2, 5, 12, 8, 6, dtype=torch.float64, seed=count)
    visible = torch.rand(2, 1, 5, 12, generator=torch.Generator().manual_seed(count)) > 0.4
    visible[1, 0, 2] = False
    cuts = sorted(data.draw(st.lists(st.integers(0, 12), min_size=count, max_size=count)))
    whole_out, whole_lse = dense_attention(query, key, value, visible)
    pieces = data.draw(st.permutations(pieces_of(query, key, value, cuts, visible)))
    out, lse = merge(pieces)
    torch.testing.assert_close(out, whole_out, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, whole_lse, atol=1e-12, rtol=0)


def test_empty_pieces_change_nothing():
    query, key, value = sharp_inputs(1, 2, 2, 3, 4, 8)
    (piece,) = pieces_of(query, key, value, [])
    nothing = Partial.empty(query, 8)
    for partials in ([piece, nothing], [nothing, piece], [nothing, piece, nothing]):
        merged = merge(partials)
        assert torch.equal(merged.out, piece.out) and torch.equal(merged.lse, piece.lse)


def test_all_empty_rows_stay_empty_and_have_zero_gradients():
    query = torch.zeros(1, 1, 2, 4)
    pieces = [Partial.empty(query, 4) for _ in range(3)]
    pieces = [Partial(p.out.requires_grad_(), p.lse.requires_grad_()) for p in pieces]
    out, lse = merge(pieces)
    assert (out == 0).all() and (lse == -torch.inf).all()
    out.sum().backward()
    assert all(p.out.grad.isfinite().all() and (p.lse.grad is None or p.lse.grad.isfinite().all()) for p in pieces)


@pytest.mark.parametrize("size", [1000.0, -1000.0])
def test_huge_lse_stays_finite(size):
    pieces = [Partial(torch.ones(1, 1, 2, 3), torch.tensor([[[size, -size]]])) for _ in range(2)]
    pieces.append(Partial(2 * torch.ones(1, 1, 2, 3), torch.zeros(1, 1, 2)))
    out, lse = merge(pieces)
    assert out.isfinite().all() and lse.isfinite().all()
    expected = torch.tensor([size, -size]).clamp_min(0) + torch.where(torch.tensor([size, -size]) > 0, 2.0, 1.0).log()
    torch.testing.assert_close(lse[0, 0], expected)


def test_gradients_of_out_and_lse_equal_autograd_through_the_formula():
    query, key, value = sharp_inputs(1, 2, 1, 4, 9, 8, dtype=torch.float64)
    grad_out, grad_lse = torch.randn(1, 2, 4, 8, dtype=torch.float64), torch.randn(1, 2, 4, dtype=torch.float64)

    def loss(function):
        leaves = [x.clone().requires_grad_() for x in (query, key, value)]
        out, lse = function(*leaves)
        return torch.autograd.grad((out * grad_out).sum() + (lse * grad_lse).sum(), leaves)

    everything = torch.ones(1, 1, 4, 9, dtype=torch.bool)
    expected = loss(lambda q, k, v: dense_attention(q, k, v, everything))
    for ours, theirs in zip(loss(lambda q, k, v: merge(pieces_of(q, k, v, [2, 2, 7]))), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)


def test_gradcheck_of_merge_itself():
    outs = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    lses = [torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    assert torch.autograd.gradcheck(lambda *x: merge([Partial(o, s) for o, s in zip(x[:3], x[3:])]), (*outs, *lses))


def test_low_precision_outputs_are_merged_in_float32():
    query, key, value = sharp_inputs(1, 2, 2, 6, 64, 16, dtype=torch.float64, sharpness=0.5)
    whole, whole_lse = dense_attention(query, key, value, torch.ones(1, 1, 6, 64, dtype=torch.bool))
    pieces = pieces_of(query, key, value, list(range(1, 64)))
    low = merge([Partial(p.out.to(torch.bfloat16), p.lse.float()) for p in pieces])
    assert low.out.dtype == torch.bfloat16 and low.lse.dtype == torch.float32
    # One rounding of each input and one of the result; merging in bfloat16 would add 63 more.
    assert (low.out.double() - whole).abs().max() <= 2 * 2**-8 * value.abs().max()
    torch.testing.assert_close(low.lse.double(), whole_lse, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(4,), (1, 4, 1), (2, 4, 6), (2, 1, 1)])
def test_sinks_are_one_more_logit_without_a_value(shape, dtype):
    query, key, value = (x.to(dtype) for x in sharp_inputs(2, 4, 4, 6, 9, 16, dtype=torch.float64))
    out, lse = dense_attention(query, key, value, torch.ones(1, 1, 6, 9, dtype=torch.bool))
    if dtype == torch.bfloat16:
        lse = lse.float()
    sinks = torch.randn(shape)
    found = with_sinks(Partial(out, lse), sinks)
    wide = (sinks.view(1, -1, 1) if len(shape) == 1 else sinks).expand(2, 4, 6)
    assert found.out.dtype == dtype and found.lse.dtype == lse.dtype
    assert torch.equal(found.out, (out * torch.sigmoid(lse - wide).unsqueeze(-1)).to(dtype)), "bit for bit"
    weights = torch.stack([lse.double(), wide.double()]).softmax(0)[0]
    torch.testing.assert_close(found.out.double(), out.double() * weights.unsqueeze(-1), atol=1e-6, rtol=2**-8)
    torch.testing.assert_close(found.lse.double(), torch.logaddexp(lse.double(), wide.double()), atol=1e-5, rtol=1e-6)


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="no partials"):
        merge([])
    with pytest.raises(ValueError, match="one shape"):
        merge([Partial.empty(torch.zeros(1, 1, 2, 4), 4), Partial.empty(torch.zeros(1, 1, 3, 4), 4)])
