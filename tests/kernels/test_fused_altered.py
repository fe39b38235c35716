"""Softcap and mask tensors in the compiled kernels, under every instruction set of this CPU, against the definition."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.kernels.cpu_fused import build
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention, sharp_inputs, visibility
from tests.kernels.fused_cases import FEW, Kind, allowing, check_call, drawn, drawn_changes, kinds
from tests.kernels.test_attend import MASKS, as_mask
from tests.kernels.test_attend_rectangles import STAR, seen_by

KINDS = kinds(("bfloat16", "float32"))
pytestmark = pytest.mark.skipif(not KINDS, reason=f"cpu_fused: {build.unavailable(torch.float32)}")
SHAPES = [(3, 590), (97, 201)]  # decoded; more than a block of rows and a tile of keys. The fuzz tests draw others
HEADS = 4


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind.instructions}-{str(kind.dtype)[6:]}")
def kind(request) -> Kind:
    """One instruction set, and memory that nothing was written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    with allowing(request.param.instructions):
        yield request.param
    torch.use_deterministic_algorithms(False)


def added(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, hidden: float = 0.0) -> torch.Tensor:
    """A random bias, a share of which hides keys, and that hides all keys of row 1."""
    generator = torch.Generator().manual_seed(7)
    real = torch.rand(shape, generator=generator) >= hidden
    if hidden and shape[2] > 1:
        real[:, :, 1] = False
    if dtype == torch.bool:
        return real
    return (3 * torch.randn(shape, generator=generator)).masked_fill(~real, -torch.inf).to(dtype)


def luck_of(shape: tuple[int, int]) -> float:
    return 3.0 if shape[0] < FEW else 1.0


BIASES = {
    "a position bias": lambda b, t, s: added((1, HEADS, t, s)).requires_grad_(),
    "one per row of the batch": lambda b, t, s: added((b, 1, t, s), torch.bfloat16, 0.3).requires_grad_(),
    "bool": lambda b, t, s: added((b, 1, t, s), torch.bool, 0.3),
    "bool per head": lambda b, t, s: added((1, HEADS, t, s), torch.bool, 0.9),
    "padding": lambda b, t, s: added((b, 1, 1, s), torch.float32, 0.5),
    "rows side by side": lambda b, t, s: added((b, HEADS, s, t)).mT,
}


@pytest.mark.parametrize("name", ["causal", "window", "causal padding"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softcap(kind, name, shape):
    fields = MASKS[name](3, *shape)
    inputs = sharp_inputs(3, HEADS, 2, *shape, 32, 48, dtype=kind.dtype)
    check_call(inputs, as_mask(fields), visibility(*shape, **fields), luck=luck_of(shape), softcap=8.0)


@pytest.mark.parametrize("softcap", [0.5, 50.0, 1e4])
@pytest.mark.parametrize("rows", [3, 90])
def test_softcaps_from_saturated_to_nearly_none(kind, softcap, rows):
    if kind.dtype == torch.float16:
        softcap = min(softcap, 1e3)  # plain attention in float16 has no finite gradient of the query with 1e4
    inputs = sharp_inputs(1, HEADS, 2, rows, 150, 64, dtype=kind.dtype)
    check_call(inputs, Mask(causal=True), visibility(rows, 150, is_causal=True), softcap=softcap)


@pytest.mark.parametrize("name, mask", list(zip(BIASES, itertools.cycle(["full", "window", "causal padding"]))))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mask_tensors(kind, name, mask, shape):
    fields = MASKS[mask](2, *shape)
    inputs = sharp_inputs(2, HEADS, 2, *shape, 32, 16, dtype=kind.dtype)
    check_call(inputs, as_mask(fields), visibility(*shape, **fields), luck=luck_of(shape), bias=BIASES[name](2, *shape))


@pytest.mark.parametrize("name", ["bool", "padding", "rows side by side"])
def test_both_and_a_plan(kind, name):
    inputs = sharp_inputs(3, HEADS, 2, 50, 50, 16, dtype=kind.dtype)
    bias = BIASES[name](3, 50, 50)
    check_call(inputs, Mask(causal=True), seen_by(STAR, 3, 50, 50, 0), [STAR], bias=bias, softcap=8.0)


@pytest.mark.parametrize("rows", [3, 140])
@pytest.mark.parametrize("lowest", [-3.0e38, -1e9])
def test_a_row_whose_keys_all_have_the_lowest_number_sees_them_all(kind, rows, lowest):
    """Transformers writes the lowest number where a key is hidden. The softmax of such a row is uniform."""
    query, key, value = sharp_inputs(1, 4, 2, rows, 200, 32, dtype=kind.dtype)
    lowest = max(lowest, torch.finfo(kind.dtype).min)  # -65504 in float16
    bias = torch.where(visibility(rows, 200, is_causal=True, offset=100), 0.0, lowest)
    bias[:, :, 1] = lowest
    query[:, :, 1] = 0
    everything = torch.ones(1, 1, rows, 200, dtype=torch.bool)
    ref, low = (
        dense_attention(*(x.to(d) for x in (query, key, value)), everything, bias=bias.to(d))[0]
        for d in (torch.float64, kind.dtype)
    )
    leaves = [x.requires_grad_() for x in (query, key, value)]
    out, lse = attend(*leaves, mask=bias, kernel="cpu_fused")
    assert_close_to_reference(out.detach(), low, ref)
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.float().sum() + lse.sum(), leaves))


@pytest.mark.parametrize("rows", [3, 140])
def test_keys_of_nan_that_the_mask_hides_do_not_spread(kind, rows):
    query, key, value = sharp_inputs(1, 2, 2, rows, 300, 16, dtype=kind.dtype)
    seen = torch.ones(1, 1, rows, 300, dtype=torch.bool)
    seen[..., 17:40] = False
    key[:, :, 17:40] = torch.nan
    assert attend(query, key, value, mask=seen, softcap=5.0, kernel="cpu_fused").out.isfinite().all()


def test_no_thread_changes_a_bit(kind):
    query, key, value = sharp_inputs(3, HEADS, 2, 170, 330, 32, dtype=kind.dtype)
    bias = added((1, 1, 170, 330)).requires_grad_()  # shared by batch and heads, so one thread adds its gradient
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            out, lse = attend(query, key, value, mask=bias, kernel="cpu_fused")
            found.append((out, lse, torch.autograd.grad(out.float().sum() + lse.sum(), bias)[0]))
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, *found))


def test_a_compiled_graph_has_the_gradient_of_the_bias(kind):
    inputs = sharp_inputs(2, HEADS, 2, 100, 130, 32, dtype=kind.dtype)
    leaves = [x.requires_grad_() for x in (*inputs, added((1, HEADS, 100, 130)))]
    function = lambda q, k, v, bias: attend(q, k, v, mask=Mask(causal=True, bias=bias), kernel="cpu_fused")  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    parts = [f(*leaves) for f in (compiled, function)]
    for a, b in zip(*parts, strict=True):
        assert torch.allclose(a, b, rtol=1e-3)
    grads = [torch.autograd.grad(part.out.float().sum(), leaves) for part in parts]
    for a, b in zip(*grads, strict=True):
        assert torch.allclose(a.float(), b.float(), rtol=2e-2, atol=1e-3)


REFUSED = {
    "float64": (dict(mask=torch.zeros(40, 40, dtype=torch.float64)), "float64: bool, float32, bfloat16 or float16"),
    "a gradient of padding": (dict(mask=torch.zeros(1, 1, 1, 40, requires_grad=True)), "the same for many rows"),
    "a gradient beside a softcap": (
        dict(mask=torch.zeros(40, 40, requires_grad=True), softcap=5.0),
        "beside a softcap",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_do_is_refused_by_name_and_given_to_another_kernel(kind, case):
    options, message = REFUSED[case]
    query, key, value = sharp_inputs(1, 2, 2, 40, 40, 16, dtype=kind.dtype)
    with pytest.raises(NotImplementedError, match=message):
        attend(query, key, value, kernel="cpu_fused", **options)
    assert attend(query, key, value, **options).out.isfinite().all()


def test_a_mask_tensor_of_another_shape_is_refused(kind):
    query, key, value = sharp_inputs(2, 2, 2, 40, 40, 16, dtype=kind.dtype)
    with pytest.raises(ValueError, match=r"must broadcast to \(2, 2, 40, 40\)"):
        attend(query, key, value, mask=torch.zeros(3, 1, 40, 40), kernel="cpu_fused")


@pytest.mark.grid
@pytest.mark.parametrize("seed", range(200))
@pytest.mark.parametrize("instructions", [kind.instructions for kind in kinds(("bfloat16",))])
def test_fuzz_of_bfloat16_products(instructions, seed):
    """`test_fused_float32.py` has the same for the other sources."""
    inputs, fields = drawn(seed, torch.bfloat16)
    rows, keys = inputs[0].shape[2], inputs[1].shape[2]
    visible = visibility(rows, keys, **fields)
    with allowing(instructions):
        check_call(inputs, as_mask(fields), visible, seed=seed, luck=3.0, **drawn_changes(seed, inputs))
