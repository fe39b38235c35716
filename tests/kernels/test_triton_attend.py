"""The Triton kernels in the interpreter against the float64 oracle: every feature, forward and gradients."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import merge
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.testing import sharp_inputs
from tests.kernels.triton_cases import check, draw, needs_interpreter, padding, segments

pytestmark = needs_interpreter

MASKS = {
    "full": lambda b, t, s: {},
    "causal": lambda b, t, s: dict(is_causal=True),
    "window": lambda b, t, s: dict(is_causal=True, window=(19, None)),
    "two-sided window": lambda b, t, s: dict(window=(7, 5)),
    "offset": lambda b, t, s: dict(is_causal=True, offset=-3),
    "padding": lambda b, t, s: dict(key_padding=padding(b, s)),
    "causal padding": lambda b, t, s: dict(is_causal=True, key_padding=padding(b, s)),
    "segments": lambda b, t, s: dict(is_causal=True, query_segments=segments(b, t), key_segments=segments(b, s)),
    "segments and padding": lambda b, t, s: dict(
        query_segments=segments(b, t), key_segments=segments(b, s), key_padding=padding(b, s)
    ),
    "prefix": lambda b, t, s: dict(is_causal=True, prefix=min(21, s)),
    "prefix and window": lambda b, t, s: dict(is_causal=True, prefix=min(5, s), window=(9, None)),
    "prefix and padding": lambda b, t, s: dict(is_causal=True, prefix=min(5, s), key_padding=padding(b, s)),
    "bool bias": lambda b, t, s: dict(bias=torch.arange(t).view(-1, 1) % 5 != torch.arange(s) % 4),
    "float bias": lambda b, t, s: dict(is_causal=True, bias=(torch.arange(t).view(-1, 1) - torch.arange(s)) * 0.25),
}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Fill what the kernels are to write with NaN, which shows what they leave unwritten."""
    from hf_attn_plugins.kernels.triton import launch as triton_launch

    plain = triton_launch.empty
    monkeypatch.setattr(triton_launch, "empty", lambda *size, **kinds: plain(*size, **kinds).fill_(float("nan")))


def batch_of(name: str, most: int) -> int:
    """Several rows of a batch where they differ."""
    return most if "padding" in name or "segments" in name else 1


@pytest.mark.parametrize("name", MASKS)
def test_masks_forward_and_gradients(name):
    batch = batch_of(name, 3)
    check(draw(batch, 35, 40), MASKS[name](batch, 35, 40))


@pytest.mark.parametrize("name", ["causal", "causal padding", "window", "segments", "prefix", "float bias"])
@pytest.mark.parametrize("rows", [1, 5])
def test_decode(name, rows):
    batch = batch_of(name, 4)
    check(draw(batch, rows, 70), MASKS[name](batch, rows, 70), gradients=rows == 1)


@pytest.mark.parametrize("rows", [1, 4, 20])
def test_static_cache_offset_held_in_a_tensor(rows):
    """A buffer of 64 keys of which 23 + rows are filled; the others hold what must not be read into the result."""
    query, key, value = draw(3, rows, 64)
    key[:, :, 23 + rows :], value[:, :, 23 + rows :] = 1e4, 1e4
    check((query, key, value), dict(is_causal=True, offset=23), tensor_offset=True, gradients=False)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "causal"), (torch.float16, "causal padding")])
def test_half_precision(dtype, name):
    check(draw(2, 35, 35, dtype=dtype, sharpness=2.0), MASKS[name](2, 35, 35))


@pytest.mark.parametrize("dims", [(24, 40), (40, 24), (16, 64), (96, 96), (256, 256)])
def test_head_dims(dims):
    check(draw(1, 19, 21, heads=(2, 1), dims=dims, sharpness=1.0), dict(is_causal=True))


@pytest.mark.parametrize("shape", [(1, 1), (1, 17), (17, 1), (16, 16), (17, 33), (33, 17), (32, 31)])
@pytest.mark.parametrize("causal", [False, True])
def test_shapes(shape, causal):
    check(draw(1, *shape), dict(is_causal=causal))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (20, 0)])
def test_empty_sides(shape):
    query, key, value = (x.requires_grad_() for x in draw(2, *shape))
    part = attend(query, key, value, kernel="triton")
    assert part.out.shape == query.shape and bool((part.lse == -torch.inf).all()) and bool((part.out == 0).all())
    part.out.sum().backward()
    assert bool((query.grad == 0).all())


@pytest.mark.parametrize("rows", [3, 35])
@pytest.mark.parametrize("name", ["causal", "segments"])
def test_softcap(rows, name):
    check(draw(1, rows, 35), MASKS[name](1, rows, 35), softcap=4.0)


@pytest.mark.parametrize("heads", [(1, 1), (6, 1), (6, 3), (3, 3)])
@pytest.mark.parametrize("rows", [2, 20])
def test_grouped_heads(heads, rows):
    check(draw(1, rows, 22, heads=heads), dict(is_causal=True))


@pytest.mark.parametrize("scale", [0.5, -0.3, 0.0])
def test_scale(scale):
    check(draw(1, 18, 20), dict(is_causal=True), scale=scale)


def test_huge_scores_stay_finite():
    query, key, value = draw(1, 18, 20)
    check((query * 100, key * 100, value), dict(is_causal=True))


def test_strided_inputs_are_read_in_place():
    """Views as models make them: heads behind tokens, slices of a projection, a cache longer than its filling."""
    base = sharp_inputs(2, 8, 8, 20, 40, 16)[1]  # (2, 8, 40, 16)
    query = base.transpose(1, 2).contiguous().transpose(1, 2)[:, :4, 3:23]
    key, value = base[:, ::2][:, :2, :30], base.flip(-1).transpose(2, 3).contiguous().transpose(2, 3)[:, 2:4, 5:35]
    assert not any(x.is_contiguous() for x in (query, key, value))
    check((query, key, value), dict(is_causal=True, key_padding=padding(2, 30)))


def test_pieces_merge_into_the_whole():
    query, key, value = draw(1, 20, 48)
    parts = [attend(query, key[:, :, s], value[:, :, s], kernel="triton") for s in (slice(0, 17), slice(17, 48))]
    whole = attend(query, key, value, kernel="triton")
    torch.testing.assert_close(merge(parts).out, whole.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merge(parts).lse, whole.lse, atol=1e-5, rtol=1e-5)


def test_tma_descriptors_load_the_same_tiles(monkeypatch):
    from hf_attn_plugins.kernels.triton import launch as triton_launch
    from hf_attn_plugins.kernels.triton.tuning import INTERPRETER

    used = []
    takes = triton_launch.takes_tma
    monkeypatch.setattr(triton_launch, "takes_tma", lambda *given: used.append(takes(*given)) or used[-1])
    monkeypatch.setitem(triton_launch.override, "forward", INTERPRETER._replace(tma=True))
    check(draw(2, 20, 40, dims=(24, 16)), dict(is_causal=True, key_padding=padding(2, 40)), gradients=False)
    odd = [x[..., 1:] for x in draw(1, 20, 20, dims=(17, 17))]  # rows that begin at no multiple of 16 bytes
    check(tuple(odd), dict(is_causal=True), gradients=False)
    assert used == [True, False]


def test_gradients_are_the_same_bits_in_every_run():
    inputs = [x.requires_grad_() for x in draw(1, 35, 35)]
    runs = []
    for _ in range(2):
        out = attend(*inputs, is_causal=True, kernel="triton").out
        runs.append(torch.autograd.grad(out.square().sum(), inputs))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_unsupported_calls_are_refused():
    query, key, value = draw(1, 4, 4)
    with pytest.raises(NotImplementedError, match="predicate"):
        attend(query, key, value, mask=Mask(predicate=lambda b, h, q, k: k <= q), kernel="triton")
    with pytest.raises(NotImplementedError, match="float64"):
        attend(query.double(), key.double(), value.double(), kernel="triton")
    with pytest.raises(NotImplementedError, match="gradient"):
        attend(query, key, value, mask=torch.zeros(4, 4, requires_grad=True), kernel="triton")
    wide = torch.zeros(1, 2, 4, 300)
    with pytest.raises(NotImplementedError, match="256"):
        attend(wide, wide, wide, kernel="triton")


FEATURES = ["causal", "window", "padding", "segments", "prefix", "bias"]
GRID_SHAPES = [(1, 40), (9, 40), (35, 35), (17, 53), (53, 17)]


@pytest.mark.grid
@pytest.mark.parametrize("pair", list(itertools.combinations(FEATURES, 2)), ids=" and ".join)
@pytest.mark.parametrize(
    ("shape", "softcap"), [*((shape, None) for shape in GRID_SHAPES), ((9, 40), 5.0), ((35, 35), 5.0)], ids=str
)
def test_pairs_of_features(pair, shape, softcap):
    """In float32, which the interpreter takes for bfloat16 too."""
    rows, keys = shape
    batch = 4 if {"padding", "segments"} & {*pair} else 1
    parts = {
        "causal": dict(is_causal=True),
        "window": dict(window=(9, 4)),
        "padding": dict(key_padding=padding(batch, keys)),
        "segments": dict(query_segments=segments(batch, rows), key_segments=segments(batch, keys)),
        "prefix": dict(prefix=min(7, keys)),
        "bias": dict(bias=torch.linspace(-1, 1, keys).expand(batch, 1, rows, keys)),
    }
    inputs = draw(batch, rows, keys, dims=(24, 16), sharpness=2.0)
    check(inputs, parts[pair[0]] | parts[pair[1]], **({} if softcap is None else {"softcap": softcap}))
