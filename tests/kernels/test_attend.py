"""attend() against an independent oracle: every kernel, mask, dtype and shape, forward and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.kernels.aten.attend import reason_against
from hf_attn_plugins.kernels.choose import load
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention, sharp_inputs, visibility

SHAPES = [(1, 1), (1, 17), (7, 7), (13, 29), (29, 13), (64, 64), (65, 129)]


def padding(batch: int, keys: int) -> torch.Tensor:
    """Left-padded, right-padded and, for the last row, no key at all."""
    real = torch.ones(batch, keys, dtype=torch.bool)
    real[0, : keys // 3] = False
    real[1 % batch, keys - keys // 4 :] = False
    real[-1] = False
    return real


def segments(batch: int, length: int) -> torch.Tensor:
    return torch.arange(length).mul(3).div(max(length, 1), rounding_mode="floor").expand(batch, length).contiguous()


MASKS = {
    "full": lambda b, t, s: {},
    "causal": lambda b, t, s: dict(is_causal=True),
    "window": lambda b, t, s: dict(is_causal=True, window=(4, None)),
    "two-sided window": lambda b, t, s: dict(window=(3, 2)),
    "padding": lambda b, t, s: dict(key_padding=padding(b, s)),
    "causal padding": lambda b, t, s: dict(is_causal=True, key_padding=padding(b, s)),
    "segments": lambda b, t, s: dict(is_causal=True, query_segments=segments(b, t), key_segments=segments(b, s)),
    "prefix": lambda b, t, s: dict(is_causal=True, prefix=min(3, s)),
    "offset": lambda b, t, s: dict(is_causal=True, offset=2),
    "all at once": lambda b, t, s: dict(
        is_causal=True, window=(9, None), offset=3, prefix=2, key_padding=padding(b, s),
        query_segments=segments(b, t), key_segments=segments(b, s),
    ),
}  # fmt: skip


def as_mask(fields: dict) -> Mask:
    fields = dict(fields)
    return Mask(causal=fields.pop("is_causal", False), **fields)


def kernels_for(query, key, value, mask, softcap=None):
    trimmed, keys = mask.trimmed(query.shape[2], key.shape[2])
    yield "reference"
    yield "cpu_tiled"
    if reason_against(query, key[:, :, keys], value[:, :, keys], trimmed, softcap, 0.0) is None:
        yield "aten"


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Tiles so small that every shape has several of them, ragged ones included."""
    from hf_attn_plugins.kernels.cpu import forward, tiling

    monkeypatch.setattr(tiling, "ROW_TILE", 16)
    monkeypatch.setattr(tiling, "KEY_TILE", 16)
    monkeypatch.setattr(forward, "FIRST_KEYS", 4)
    monkeypatch.setattr(tiling, "SCORES", 2000)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_forward(name, shape, dtype):
    check_forward(name, shape, dtype)


def check_forward(name, shape, dtype, factor=2.0):
    rows, keys = shape
    fields = MASKS[name](3, rows, keys)
    mask = as_mask(fields)
    query, key, value = sharp_inputs(3, 4, 2, rows, keys, 20, 12, dtype=dtype)
    visible = visibility(rows, keys, **fields)
    ref_out, ref_lse = dense_attention(query.double(), key.double(), value.double(), visible)
    low_out, low_lse = dense_attention(query, key, value, visible)
    for kernel in kernels_for(query, key, value, mask):
        out, lse = attend(query, key, value, mask=mask, kernel=kernel)
        assert out.dtype == dtype and lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        seen = ref_lse > -torch.inf
        assert ((lse > -torch.inf) == seen).all(), f"{kernel}: empty rows differ"
        assert (out[~seen] == 0).all(), f"{kernel}: rows without keys must be 0"
        assert_close_to_reference(out, low_out, ref_out, factor, f"{kernel} out")
        # Half as much again: a handful of rows leaves the plain computation's worst error to luck
        assert_close_to_reference(lse[seen], low_lse[seen], ref_lse[seen], 1.5 * factor, f"{kernel} lse")


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradients_of_out_and_lse(name, dtype, softcap):
    rows, keys = 21, 37
    fields = MASKS[name](3, rows, keys)
    mask = as_mask(fields)
    visible = visibility(rows, keys, **fields)
    inputs = sharp_inputs(3, 4, 2, rows, keys, 20, 12, dtype=dtype)
    grad_out, grad_lse = torch.randn(3, 4, rows, 12, dtype=torch.float64), torch.randn(3, 4, rows, dtype=torch.float64)
    seen = visible.any(-1)

    def gradients(function, dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
        out, lse = function(*leaves)
        lse = torch.where(seen.expand(lse.shape), lse, 0)
        loss = (out * grad_out.to(out.dtype)).sum() + (lse * grad_lse.to(lse.dtype)).sum()
        return torch.autograd.grad(loss, leaves)

    ref = gradients(lambda q, k, v: dense_attention(q, k, v, visible, softcap=softcap), torch.float64)
    low = gradients(lambda q, k, v: dense_attention(q, k, v, visible, softcap=softcap), dtype)
    for kernel in kernels_for(*inputs, mask, softcap):
        got = gradients(lambda q, k, v: attend(q, k, v, mask=mask, softcap=softcap, kernel=kernel), dtype)  # noqa: B023
        for which, g, lo, r in zip(("query", "key", "value"), got, low, ref, strict=True):
            # Weights come back as exp(score - lse): with scores near 100, rounding the lse costs float32 more than the
            # plain formula's error; in bfloat16 it is lost among the other roundings.
            factor = 10.0 if dtype == torch.float32 else 3.0
            assert_close_to_reference(g, lo, r, factor, f"{kernel} grad_{which}")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 21, 37), (3, 1, 1, 37), (1, 4, 21, 37), (3, 4, 21, 37)], ids=str)
def test_float_mask_and_its_gradient(shape):
    query, key, value = sharp_inputs(3, 4, 2, 21, 37, 16, dtype=torch.float64)
    bias = torch.randn(shape, dtype=torch.float64)
    grad = torch.randn(3, 4, 21, 16, dtype=torch.float64)
    ref_bias, our_bias = bias.clone().requires_grad_(), bias.clone().requires_grad_()
    ref, _ = dense_attention(query, key, value, torch.ones(1, 1, 21, 37, dtype=torch.bool), bias=ref_bias)
    for kernel in ("reference", "aten", "cpu_tiled"):
        out = attend(query, key, value, mask=bias, kernel=kernel).out
        torch.testing.assert_close(out, ref, atol=1e-10, rtol=0)
    out = attend(query, key, value, mask=our_bias).out
    out.backward(grad)
    ref.backward(grad)
    torch.testing.assert_close(our_bias.grad, ref_bias.grad, atol=1e-10, rtol=0)


def test_bool_mask_with_size_one_dims():
    query, key, value = sharp_inputs(2, 4, 2, 9, 33, 16, dtype=torch.float64)
    visible = torch.rand(2, 1, 9, 33) > 0.5
    visible[0, 0, 4] = False
    ref, ref_lse = dense_attention(query, key, value, visible)
    for kernel in ("reference", "aten", "cpu_tiled"):
        out, lse = attend(query, key, value, mask=visible, kernel=kernel)
        torch.testing.assert_close(out, ref, atol=1e-10, rtol=0)
        torch.testing.assert_close(lse, ref_lse, atol=1e-10, rtol=0)


@pytest.mark.parametrize("kernel", ["reference", "aten", "cpu_tiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1000.0, -1000.0])
def test_huge_scores_stay_finite(kernel, dtype, size):
    query = torch.full((1, 2, 40, 4), size).to(dtype).requires_grad_()
    key = (torch.randn(1, 1, 70, 4).sign()).to(dtype).requires_grad_()
    value = torch.randn(1, 1, 70, 4).to(dtype).requires_grad_()
    out, lse = attend(query, key, value, scale=1.0, is_causal=True, kernel=kernel)
    (out.float().sum() + lse.sum()).backward()
    for tensor in (out, lse, query.grad, key.grad, value.grad):
        assert tensor.isfinite().all()


def test_a_later_tile_with_far_larger_scores():
    """The fast path guesses the maximum from the first keys: a needle far above it must still win, exactly."""
    query, key, value = sharp_inputs(1, 2, 2, 50, 90, 16, dtype=torch.bfloat16, sharpness=0.5)
    key[:, :, 61] = 40 * query[:, :, 30].sign()
    visible = torch.ones(1, 1, 50, 90, dtype=torch.bool)
    ref, ref_lse = dense_attention(query.double(), key.double(), value.double(), visible)
    low, low_lse = dense_attention(query, key, value, visible)
    out, lse = attend(query, key, value, kernel="cpu_tiled")
    assert_close_to_reference(out, low, ref)
    assert_close_to_reference(lse, low_lse, ref_lse)


def test_predicate_is_evaluated_on_tiles_with_positions():
    query, key, value = sharp_inputs(2, 4, 2, 20, 50, 16, dtype=torch.float64)
    tiles = []

    def chunked(b, h, q, k):
        tiles.append((q.numel(), k.numel()))
        return (q // 8 == k // 8) & (k <= q) & (b >= 0)

    q, k = torch.arange(20)[:, None] + 30, torch.arange(50)[None]
    ref, _ = dense_attention(query, key, value, ((q // 8 == k // 8) & (k <= q))[None, None])
    torch.testing.assert_close(attend(query, key, value, mask=Mask(predicate=chunked)).out, ref, atol=1e-10, rtol=0)
    assert max(rows for rows, _ in tiles) <= 16 and max(keys for _, keys in tiles) <= 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dropout_keeps_the_mean_and_its_gradient_uses_the_same_mask(dtype):
    torch.manual_seed(0)
    query, key, value = sharp_inputs(1, 2, 2, 40, 60, 16, dtype=dtype, sharpness=0.3)
    plain = attend(query, key, value, is_causal=True).out.float()
    runs = torch.stack([attend(query, key, value, is_causal=True, dropout=0.3).out.float() for _ in range(300)])
    assert (runs[0] != runs[1]).any()
    assert ((runs.mean(0) - plain).abs() <= 5 * runs.std(0) / 300**0.5 + 2e-2).all()
    # Values enter linearly: with the mask of the forward pass, <out, g> = <value, grad_value>.
    value.requires_grad_()
    out = attend(query, key, value, dropout=0.3, kernel="cpu_tiled").out
    grad = torch.randn(out.shape).to(dtype)
    out.backward(grad)
    left, right = (out.double() * grad.double()).sum(), (value.double() * value.grad.double()).sum()
    torch.testing.assert_close(left, right, rtol=2e-2 if dtype == torch.bfloat16 else 1e-4, atol=0.1)


def test_dropout_gradient_of_query_and_key_by_finite_differences():
    torch.manual_seed(0)
    inputs = [x.requires_grad_() for x in sharp_inputs(1, 2, 1, 9, 20, 8, dtype=torch.float64, sharpness=0.5)]

    def function(*x):
        torch.manual_seed(1)
        return attend(*x, dropout=0.4, kernel="cpu_tiled")

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("kernel", ["aten", "cpu_tiled"])
@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_nothing_to_attend(kernel, sizes):
    rows, keys = sizes
    query, key, value = torch.randn(2, 4, rows, 8), torch.randn(2, 2, keys, 8), torch.randn(2, 2, keys, 6)
    out, lse = attend(query, key, value, is_causal=True, kernel=kernel)
    assert out.shape == (2, 4, rows, 6) and (out == 0).all() and (lse == -torch.inf).all()


def test_strided_inputs_are_not_changed():
    query, key, value = (torch.randn(2, 30, 4, 16).to(torch.bfloat16).transpose(1, 2) for _ in range(3))
    copies = [x.clone() for x in (query, key, value)]
    for kernel in ("aten", "cpu_tiled"):
        a = attend(query, key, value, is_causal=True, kernel=kernel).out
        b = attend(*(x.contiguous() for x in (query, key, value)), is_causal=True, kernel=kernel).out
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    assert all((x == c).all() for x, c in zip((query, key, value), copies, strict=True))


ONE = torch.zeros(1, 2, 3, 4)
BAD = {
    "3-d": (dict(query=ONE[0]), "4-d"),
    "batch": (dict(key=ONE.expand(2, -1, -1, -1)), "one batch size"),
    "tokens": (dict(key=ONE[:, :, :2]), "heads and tokens"),
    "head_dim": (dict(query=ONE[..., :3]), "one head_dim"),
    "heads": (dict(query=torch.zeros(1, 3, 3, 4)), "multiple"),
    "dtype": (dict(value=ONE.double()), "one float dtype"),
    "kernel": (dict(kernel="cuda_magic"), "reference, aten, cpu_tiled"),
    "window": (dict(window=0), "at least 1 key"),
    "window pair": (dict(window=(-1, 0)), "counts >= 0"),
    "mask dtype": (dict(mask=torch.ones(3, 3, dtype=torch.int32)), "bool"),
    "dropout": (dict(dropout=1.5), "probability"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    changes, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        attend(**{**dict(query=ONE, key=ONE, value=ONE), **changes})


def test_a_named_kernel_never_falls_back():
    with pytest.raises(NotImplementedError, match="softcap"):
        attend(ONE, ONE, ONE, softcap=2.0, kernel="aten")
    assert load("aten").__name__ == "aten"


@pytest.mark.grid
@pytest.mark.parametrize("rows,keys", list(itertools.product([1, 2, 3, 15, 16, 17, 31, 32, 33, 61], repeat=2)))
@pytest.mark.parametrize("name", MASKS)
def test_grid(name, rows, keys):
    for dtype in (torch.float32, torch.bfloat16):
        # Of shapes with few rows some pass twice the worst error of the plain computation by luck: summed in another
        # order, that computation does so itself in one draw of twenty (and never four times).
        check_forward(name, (rows, keys), dtype, factor=4.0)


@pytest.mark.parametrize("transposed", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize(("rows", "keys"), [(40, 40), (1, 40), (8, 700), (300, 300)])
@pytest.mark.parametrize("kernel", [None, "aten", "cpu_tiled"])
def test_elements_need_not_lie_side_by_side(kernel, rows, keys, transposed):
    """Some models (Inkling) hand over keys whose last dimension has a stride of its own."""
    query, key, value = sharp_inputs(2, 4, 2, rows, keys, 16)
    strided = [x.mT.contiguous().mT if t else x for x, t in zip((query, key, value), transposed, strict=True)]
    assert any(x.stride(-1) != 1 for x in strided) or rows == 1
    leaves = [[x.clone(memory_format=torch.preserve_format).requires_grad_() for x in group]
              for group in ([query, key, value], strided)]  # fmt: skip
    outs = [attend(*group, is_causal=True, kernel=kernel).out for group in leaves]
    expected, _ = dense_attention(query.double(), key.double(), value.double(), visibility(rows, keys, is_causal=True))
    for out, group in zip(outs, leaves, strict=True):
        torch.testing.assert_close(out, expected.float(), atol=1e-4, rtol=1e-4)
        with torch.no_grad():  # the short way around the bookkeeping of gradients
            torch.testing.assert_close(attend(*group, is_causal=True, kernel=kernel).out, out, atol=1e-5, rtol=1e-5)
        out.square().sum().backward()
    for plain, other in zip(*leaves, strict=True):
        torch.testing.assert_close(other.grad, plain.grad, atol=1e-4, rtol=1e-3)
