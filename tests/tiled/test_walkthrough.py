"""The textbook forward and backward, in float64, against the dense oracle and autograd."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings

from hf_attn_plugins.testing import dense_attention, sharp_inputs, visibility
from hf_attn_plugins.tiled.plan import ORDERS, TilePlan
from hf_attn_plugins.tiled.walkthrough import (
    backward,
    causal_mask,
    forward,
    softmax,
    softmax_gradient,
    unnormalised_backward,
)

from .test_plan import plans


def oracle(query, key, value, scale, seen):
    """out (N, d) and lse (N,) by the definition; `seen` is (N, N), or whether the mask is causal."""
    if isinstance(seen, bool):
        seen = visibility(len(query), len(key), is_causal=seen)
    out, lse = dense_attention(query[None, None], key[None, None], value[None, None], seen, scale=scale)
    return out[0, 0], lse[0, 0]


def example(plan, sharpness=2.0):
    n = plan.length
    return [x[0, 0] for x in sharp_inputs(1, 1, 1, n, n, plan.head_dim, dtype=torch.float64, sharpness=sharpness)]


@given(plans(max_length=30))
@settings(max_examples=80, deadline=None)
def test_forward_and_backward_equal_plain_attention(plan):
    query, key, value = (x.requires_grad_() for x in example(plan))
    scale = plan.head_dim**-0.5
    out, lse = oracle(query, key, value, scale, plan.causal)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    expected = torch.autograd.grad(out, (query, key, value), grad_out)
    with torch.no_grad():
        done = forward(query, key, value, plan, scale)
        found = backward(query, key, value, done.out, done.lse, grad_out, plan, scale)
    assert (done.out - out).abs().max() < 1e-10 and (done.lse - lse).abs().max() < 1e-10
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() < 1e-10


@given(plans(max_length=30))
@settings(max_examples=40, deadline=None)
def test_every_step_is_softmax_over_the_keys_met_so_far(plan):
    query, key, value = example(plan)
    done = forward(query, key, value, plan, 0.5)
    met = torch.zeros(plan.length, plan.length, dtype=torch.bool)
    assert [step.tile for step in done.steps] == list(plan.tiles())
    for step in done.steps:
        rows = list(step.tile.rows)
        met[rows[0] : rows[-1] + 1, step.tile.keys.start : step.tile.keys.stop] = True
        seen = met & visibility(plan.length, plan.length, is_causal=plan.causal)[0, 0]
        mean, lse = (x[rows] for x in oracle(query, key, value, 0.5, seen))
        assert (step.mean - mean).abs().max() < 1e-10
        assert (step.max_after + step.sum_after.log() - lse).abs().max() < 1e-10
        assert torch.allclose(step.rescale, (step.max_before - step.max_after).exp())
        # Each tile's unnormalised weights take the sum from what it was to what it is.
        assert torch.allclose(step.sum_before * step.rescale + step.weights.sum(1), step.sum_after)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("causal", [False, True])
def test_huge_scores_stay_finite(order, causal):
    plan = TilePlan(11, 4, 40, causal, order)
    query, key, value = example(plan, sharpness=40.0)
    done = forward(query, key, value, plan, 1.0)
    out, lse = oracle(query, key, value, 1.0, causal)
    assert lse.abs().max() > 1000
    assert (done.out - out).abs().max() < 1e-10 and ((done.lse - lse) / lse).abs().max() < 1e-12
    assert all(x.isfinite().all() for x in backward(query, key, value, done.out, done.lse, value, plan, 1.0))


def test_a_row_that_sees_nothing_of_a_tile_on_the_diagonal():
    """Blocks of 3 keys and 2 rows: row 2 shares a tile with keys 3 to 5 and sees none of them."""
    plan = TilePlan(6, 2, 20, causal=True)
    query, key, value = example(plan)
    for order in ORDERS:
        done = forward(query, key, value, dataclasses.replace(plan, order=order), 1.0)
        blind = [step for step in done.steps if step.scores.isneginf().all(1).any()]
        assert blind and torch.equal(blind[0].max_before[0], blind[0].max_after[0])
        assert (done.out - oracle(query, key, value, 1.0, True)[0]).abs().max() < 1e-12


@pytest.mark.parametrize("causal", [False, True])
def test_the_unnormalised_backward_is_wrong_and_by_how_much(causal):
    plan = TilePlan(6, 2, 20, causal)
    leaves = [x.requires_grad_() for x in example(plan)]
    out, lse = oracle(*leaves, 1.0, causal)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    expected = torch.autograd.grad(out, leaves, grad_out)
    query, key, value = (x.detach() for x in leaves)
    wrong = unnormalised_backward(query, key, value, grad_out, 1.0, causal)
    for ours, theirs in zip(wrong, expected, strict=True):
        assert (ours - theirs).norm() > 0.1 * theirs.norm()
    # Its dV is the right one with every row's output gradient multiplied by that row's sum of exp(score - max).
    scores = query @ key.T
    scores = causal_mask(scores)[0] if causal else scores
    sums = (lse.detach() - scores.amax(1)).exp()
    done = forward(query, key, value, plan, 1.0)
    scaled = backward(query, key, value, done.out, done.lse, grad_out * sums[:, None], plan, 1.0)
    assert torch.allclose(wrong[2], scaled[2])


def test_softmax_gradient_equals_the_jacobian_written_out_row_by_row():
    scores, grad = torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 3
    found = softmax_gradient(softmax(scores), grad)
    for row in range(4):
        jacobian = torch.autograd.functional.jacobian(lambda x: torch.softmax(x, 0), scores[row])
        assert torch.allclose(found[row], jacobian.T @ grad[row], atol=1e-14)


def test_softmax_is_finite_and_right_for_huge_scores():
    scores = torch.tensor([[1000.0, 999.0, -1000.0], [-1000.0, -1000.0, -1000.0]], dtype=torch.float64)
    assert torch.allclose(softmax(scores), torch.softmax(scores, 1), atol=0, rtol=1e-14)


def test_causal_mask():
    scores = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masked, visible = causal_mask(scores)
    assert torch.equal(visible, visibility(4, 4, is_causal=True)[0, 0])
    assert torch.equal(masked[visible], scores[visible]) and bool((masked[~visible] == -torch.inf).all())
