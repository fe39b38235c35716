"""CQS attention against dense attention: any number of workers, every mask, gradients, and nothing computed in vain."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_attn_plugins import cqs
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.cqs import workers as workers_module
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention, sharp_inputs, visibility

WORKERS = [1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 31, 57, 64, 91]
HEADS = [(2, 2), (4, 2), (3, 1)]
# The published code bans needed blocks for these; a few of them by default, all under the marker.
ONCE_WRONG = [*range(9, 14), *range(33, 112)]


def triangle(tokens: int, is_causal: bool) -> Tensor:
    everything = torch.ones(tokens, tokens, dtype=torch.bool)
    return everything.tril() if is_causal else everything


def compare_with_dense(workers: Any, tokens: int, is_causal: bool, heads: tuple[int, int], kernel: str | None) -> None:
    inputs = sharp_inputs(2, *heads, tokens, tokens, 6, 5, dtype=torch.float64, seed=tokens)
    for x in inputs:
        x.requires_grad_()
    out, lse = cqs.attention(*inputs, cqs.plan(tokens, workers), is_causal=is_causal, kernel=kernel)
    ref, ref_lse = dense_attention(*inputs, triangle(tokens, is_causal))
    assert (out - ref).abs().max() < 1e-10 and (lse - ref_lse).abs().max() < 1e-10
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (out, lse)]
    found = torch.autograd.grad([out, lse], inputs, upstream)
    expected = torch.autograd.grad([ref, ref_lse], inputs, upstream)
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) < 1e-10


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("workers", WORKERS)
def test_equals_dense(workers: int, is_causal: bool) -> None:
    compare_with_dense(workers, 97, is_causal, (4, 2), None)


@pytest.mark.grid
@pytest.mark.parametrize("kernel", ["reference", "aten", "cpu_tiled"])
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 64, 97, 191])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("workers", WORKERS)
def test_equals_dense_grid(workers: int, is_causal: bool, tokens: int, heads: tuple[int, int], kernel: str) -> None:
    compare_with_dense(workers, tokens, is_causal, heads, kernel)


@pytest.mark.parametrize("tokens", [1, 2, 6])
@pytest.mark.parametrize("heads", HEADS)
def test_fewer_tokens_than_workers(tokens: int, heads: tuple[int, int]) -> None:
    for is_causal in (False, True):
        compare_with_dense(8, tokens, is_causal, heads, None)


@pytest.mark.parametrize("workers", [(7, 7), (4, 7), (8, 10), (13, 2), (3, 3, 3)])
def test_recursive_plans_equal_dense(workers: tuple[int, ...]) -> None:
    for is_causal in (False, True):
        compare_with_dense(workers, 75, is_causal, (4, 2), None)


@pytest.mark.parametrize("workers", [9, 11, 33, 57, 91, 111])
def test_where_the_published_code_is_wrong(workers: int) -> None:
    compare_with_dense(workers, 2 * workers + 3, False, (1, 1), "reference")


@pytest.mark.grid
@pytest.mark.parametrize("workers", ONCE_WRONG)
def test_where_the_published_code_is_wrong_grid(workers: int) -> None:
    compare_with_dense(workers, 2 * workers + 3, False, (1, 1), "reference")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_causal", [False, True])
def test_error_rule_in_low_precision(dtype: torch.dtype, is_causal: bool) -> None:
    tokens = 230
    inputs = sharp_inputs(1, 4, 2, tokens, tokens, 16, dtype=dtype)
    exact = [x.double().requires_grad_() for x in inputs]
    plain = [x.clone().requires_grad_() for x in inputs]
    found = [x.clone().requires_grad_() for x in inputs]
    visible = triangle(tokens, is_causal)
    ref, _ = dense_attention(*exact, visible)
    low, _ = dense_attention(*plain, visible)
    out, _ = cqs.attention(*found, cqs.plan(tokens, 7), is_causal=is_causal)
    assert out.dtype == dtype
    assert_close_to_reference(out, low, ref)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    grads = [torch.autograd.grad(y, x, upstream.to(y.dtype)) for y, x in ((ref, exact), (low, plain), (out, found))]
    for name, r, p, f in zip("qkv", *grads, strict=True):
        assert_close_to_reference(f, p, r, factor=3.0, name=name)


def test_scores_of_a_thousand_stay_finite() -> None:
    query, key, value = sharp_inputs(1, 2, 2, 60, 60, 8, dtype=torch.float32, sharpness=60.0)
    assert (query @ key.mT * 8**-0.5).abs().max() > 1000
    out, lse = cqs.attention(query, key, value, cqs.plan(60, 7))
    ref, ref_lse = dense_attention(query.double(), key.double(), value.double(), triangle(60, False))
    low, _ = dense_attention(query, key, value, triangle(60, False))
    assert_close_to_reference(out, low, ref)
    assert torch.isfinite(lse).all() and (lse - ref_lse).abs().max() < 0.01


N = 61


def padded() -> Tensor:
    real = torch.ones(3, N, dtype=torch.bool)
    real[0, :20] = False
    real[1, 40:] = False
    real[2] = False
    return real


def documents() -> Tensor:
    return torch.arange(N).mul(4).div(N, rounding_mode="floor").expand(3, N).contiguous()


FIELDS: dict[str, dict[str, Any]] = {
    "padding": {"key_padding": padded()},
    "causal padding": {"causal": True, "key_padding": padded()},
    "window": {"causal": True, "window": (9, None)},
    "two-sided window": {"window": (3, 12)},
    "prefix": {"causal": True, "prefix": 11},
    "prefix and window": {"causal": True, "prefix": 5, "window": (6, None)},
    "documents": {"causal": True, "query_segments": documents(), "key_segments": documents()},
    "window, documents, padding": {
        "causal": True,
        "window": (14, None),
        "query_segments": documents(),
        "key_segments": documents(),
        "key_padding": padded(),
    },
}


def visible_to(fields: dict[str, Any]) -> Tensor:
    renamed = {("is_causal" if name == "causal" else name): field for name, field in fields.items()}
    return visibility(N, N, **renamed)


@pytest.mark.parametrize("workers", [2, 7, 8, (3, 4)])
@pytest.mark.parametrize("name", FIELDS)
def test_masks_by_global_position(name: str, workers: Any) -> None:
    inputs = sharp_inputs(3, 4, 2, N, N, 6, dtype=torch.float64)
    for x in inputs:
        x.requires_grad_()
    out, lse = cqs.attention(*inputs, cqs.plan(N, workers), mask=Mask(**FIELDS[name]))
    ref, ref_lse = dense_attention(*inputs, visible_to(FIELDS[name]))
    assert (out - ref).abs().max() < 1e-10
    seen = ref_lse > -torch.inf
    assert ((lse > -torch.inf) == seen).all() and (lse - ref_lse)[seen].abs().max() < 1e-10
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=out.dtype)
    found, expected = (torch.autograd.grad(y, inputs, upstream) for y in (out, ref))
    assert max((a - b).abs().max() for a, b in zip(found, expected, strict=True)) < 1e-10


@pytest.mark.parametrize("is_causal", [False, True])
def test_predicates_see_global_positions(is_causal: bool) -> None:
    def every_third(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return ((q + 2 * k + b) % 3 != 0) | (q == k)

    inputs = sharp_inputs(2, 2, 1, N, N, 6, dtype=torch.float64)
    out, _ = cqs.attention(*inputs, cqs.plan(N, 7), mask=Mask(predicate=every_third), is_causal=is_causal)
    b, q, k = torch.meshgrid(torch.arange(2), torch.arange(N), torch.arange(N), indexing="ij")
    visible = every_third(b, b, q, k).unsqueeze(1) & triangle(N, is_causal)
    assert (out - dense_attention(*inputs, visible)[0]).abs().max() < 1e-10


@pytest.mark.parametrize("shape", [(2, 4, N, N), (1, 1, N, N), (2, 1, 1, N), (N, N)])
def test_mask_tensors(shape: tuple[int, ...]) -> None:
    inputs = sharp_inputs(2, 4, 2, N, N, 6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    added = torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
    out, _ = cqs.attention(*inputs, cqs.plan(N, 7), mask=added, is_causal=True)
    ref, _ = dense_attention(*inputs, triangle(N, True), bias=added)
    assert (out - ref).abs().max() < 1e-10
    (found,), (expected,) = (torch.autograd.grad(y.square().sum(), added) for y in (out, ref))
    assert (found - expected).abs().max() < 1e-10
    allowed = torch.rand(shape, generator=generator) < 0.5
    out, _ = cqs.attention(*inputs, cqs.plan(N, 7), mask=allowed)
    assert (out - dense_attention(*inputs, allowed.expand(2, 4, N, N))[0]).abs().max() < 1e-10


def test_scale_and_softcap() -> None:
    inputs = sharp_inputs(2, 4, 2, N, N, 6, dtype=torch.float64)
    out, lse = cqs.attention(*inputs, cqs.plan(N, 13), is_causal=True, scale=0.7, softcap=5.0)
    ref, ref_lse = dense_attention(*inputs, triangle(N, True), scale=0.7, softcap=5.0)
    assert (out - ref).abs().max() < 1e-10 and (lse - ref_lse).abs().max() < 1e-10


def test_sinks_enter_once() -> None:
    query, key, value = sharp_inputs(1, 2, 2, N, N, 6, dtype=torch.float64)
    sinks = torch.tensor([0.5, 3.0], dtype=torch.float64, requires_grad=True)
    out, lse = cqs.attention(query, key, value, cqs.plan(N, 7), is_causal=True, sinks=sinks)
    # A sink is a key whose score is the same for every row and whose value is zero.
    scores = (query @ key.mT * 6**-0.5).masked_fill(~triangle(N, True), -torch.inf)
    scores = torch.cat([scores, sinks.view(1, 2, 1, 1).expand(1, 2, N, 1)], -1)
    ref = scores.softmax(-1)[..., :N] @ value
    assert (out - ref).abs().max() < 1e-10 and (lse - scores.logsumexp(-1)).abs().max() < 1e-10
    (found,), (expected,) = (torch.autograd.grad(y.square().sum(), sinks) for y in (out, ref))
    assert (found - expected).abs().max() < 1e-10


def test_no_tokens() -> None:
    query, key, value = sharp_inputs(2, 4, 2, 0, 0, 6, 5)
    out, lse = cqs.attention(query, key, value, cqs.plan(0, 7), is_causal=True)
    assert out.shape == (2, 4, 0, 5) and lse.shape == (2, 4, 0)


class Counter:
    """Stands in for `attend` and counts the cells handed to it."""

    def __init__(self) -> None:
        self.cells, self.calls = 0, 0

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        self.cells, self.calls = self.cells + query.shape[2] * key.shape[2], self.calls + 1
        return attend(query, key, value, **options)


@pytest.mark.parametrize("workers", [4, 7, 8, 13, 31, (7, 7)])
def test_banned_blocks_are_not_computed(workers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    counter, tokens = Counter(), 2000
    monkeypatch.setattr(workers_module, "attend", counter)
    inputs = sharp_inputs(1, 1, 1, tokens, tokens, 2)
    cqs.attention(*inputs, cqs.plan(tokens, workers))
    assert counter.cells == tokens**2  # the dense local kernel of the paper computes m^2 / W times as many
    leaves = list(cqs.plan(tokens, workers).leaves())
    assert counter.calls <= sum(len(leaf.ranges) for leaf in leaves)
    counter.cells = 0
    cqs.attention(*inputs, cqs.plan(tokens, workers), is_causal=True)
    assert counter.cells <= tokens**2 * (0.5 + 0.5 / len(leaves) + 0.05)


def test_a_window_leaves_out_what_is_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    counter, tokens = Counter(), 1300
    monkeypatch.setattr(workers_module, "attend", counter)
    cqs.attention(*sharp_inputs(1, 1, 1, tokens, tokens, 2), cqs.plan(tokens, 13), is_causal=True, window=50)
    assert counter.cells <= 13 * 2 * 100 * 100


def test_workers_run_from_their_material_alone() -> None:
    from hf_attn_plugins.cqs.tokens import Tokens

    inputs = sharp_inputs(1, 2, 1, 50, 50, 4, dtype=torch.float64)
    plan = cqs.plan(50, 8)
    leaves = list(plan.leaves())
    tiler = cqs.Tiler(leaves, inputs[0], 4)
    for leaf, positions in zip(leaves, plan.material, strict=True):
        material = [Tokens(x[:, :, positions], leaf.ranges) for x in inputs]
        tiler.add(cqs.work(leaf, *material, mask=Mask(causal=True)))
    ref, _ = dense_attention(*inputs, triangle(50, True))
    assert (tiler.result().out - ref).abs().max() < 1e-10


def test_refusals() -> None:
    inputs = sharp_inputs(1, 2, 1, 20, 20, 4)
    with pytest.raises(ValueError, match="for 21 tokens, got 20 query"):
        cqs.attention(*inputs, cqs.plan(21, 7))
    with pytest.raises(ValueError, match="position 0"):
        cqs.attention(*inputs, cqs.plan(20, 7), mask=Mask(causal=True, offset=3))
    with pytest.raises(ValueError, match="plan is missing"):
        cqs.attention(*inputs)
    with pytest.raises(ValueError, match=r"device, folder needs a memory_budget"):
        cqs.attention(*inputs, cqs.plan(20, 7), device="cpu", folder=".")
    with pytest.raises(ValueError, match="pass one of them"):
        cqs.attention(*inputs, cqs.plan(20, 7), mask=Mask(window=(3, 3)), window=4)
    with pytest.raises(ValueError, match="not among those held"):
        from hf_attn_plugins.cqs.tokens import Tokens

        Tokens(inputs[0][:, :, :5], [(0, 5)]).take([(3, 7)])


def test_all_pairs_of_options_agree_with_attend() -> None:
    inputs = sharp_inputs(2, 4, 2, N, N, 6, dtype=torch.float64)
    for is_causal, softcap, window in itertools.product((False, True), (None, 4.0), (None, 10)):
        options: dict[str, Any] = {"is_causal": is_causal, "softcap": softcap, "window": window}
        found, expected = cqs.attention(*inputs, cqs.plan(N, 7), **options), attend(*inputs, **options)
        assert (found.out - expected.out).abs().max() < 1e-10
