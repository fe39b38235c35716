"""The compiled kernels that multiply in float32, under every instruction set of this CPU, against the definition."""

from __future__ import annotations

import itertools
import re
import shutil
from pathlib import Path

import pytest
import torch

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.kernels.attend_rectangles import attend_rectangles
from hf_attn_plugins.kernels.cpu_fused import build, call, instruction_sets
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention, sharp_inputs, visibility
from tests.kernels.fused_cases import FEW, Kind, allowing, check_call, drawn, drawn_changes, kinds
from tests.kernels.test_attend import MASKS, as_mask
from tests.kernels.test_attend_rectangles import PAIRS, PER_ROW, STAR, padding, seen_by

KINDS = kinds()
pytestmark = pytest.mark.skipif(not KINDS, reason=f"cpu_fused: {build.unavailable(torch.float32)}")
# Few rows, in chunks of 576 keys; 24 and 48 lanes of a group, 96 of a block, tiles of 96 keys; ragged last steps.
SHAPES = [(1, 1), (1, 1230), (7, 7), (20, 590), (65, 129), (97, 201), (200, 71), (130, 330)]


@pytest.fixture(params=KINDS, ids=lambda kind: f"{kind.instructions}-{str(kind.dtype)[6:]}")
def kind(request) -> Kind:
    """One instruction set, and memory that nothing was written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    with allowing(request.param.instructions):
        yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(kind, name, shape):
    fields = MASKS[name](3, *shape)
    inputs = sharp_inputs(3, 4, 2, *shape, 32, 48, dtype=kind.dtype)
    check_call(inputs, as_mask(fields), visibility(*shape, **fields))


@pytest.mark.parametrize("head_dims", [(16, 16), (64, 64), (80, 112), (128, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("rows", [3, 90])
def test_head_dims_and_shared_keys(kind, head_dims, heads, rows):
    inputs = sharp_inputs(2, *heads, rows, 150, *head_dims, dtype=kind.dtype)
    check_call(inputs, Mask(causal=True), visibility(rows, 150, is_causal=True), luck=3 if rows < FEW else 1)


@pytest.mark.parametrize("plan", [STAR, PAIRS, PER_ROW], ids=["star", "pairs", "per row"])
def test_plans(kind, plan):
    real = padding(3, 50)
    lists = plan if isinstance(plan[0], list) else [plan]
    inputs = sharp_inputs(3, 2, 1, 50, 50, 16, dtype=kind.dtype)
    seen = seen_by(plan, 3, 50, 50, 0) & real[:, None, None]
    check_call(inputs, Mask(causal=True, key_padding=real), seen, lists)


def test_a_long_plan(kind):
    plan = [Rectangle(0, 130, 0, 130, True), Rectangle(130, 300, 0, 17), Rectangle(130, 300, 101, 300, True)]
    inputs = sharp_inputs(1, 2, 1, 300, 300, 16, dtype=kind.dtype)
    check_call(inputs, Mask(causal=True), seen_by(plan, 1, 300, 300, 0), [plan])


def test_many_rows_that_walk_together(kind):
    """From 2048 rows and keys on and at head_dim 128, pairs of blocks walk together; each sees tiles of its own."""
    rows, keys = 2100, 2120  # the last block has no second one, and its last group is not full
    fields = {"is_causal": True, "window": (100, None), "key_padding": torch.arange(keys).unsqueeze(0) >= 20}
    query, key, value = sharp_inputs(1, 2, 1, rows, keys, 128, dtype=kind.dtype)
    visible = visibility(rows, keys, **fields)
    ref, ref_lse = dense_attention(query.double(), key.double(), value.double(), visible)
    low, low_lse = dense_attention(query, key, value, visible)
    out, lse = attend(query, key, value, mask=as_mask(fields), kernel="cpu_fused")
    assert_close_to_reference(out, low, ref)
    assert_close_to_reference(lse, low_lse, ref_lse, 3.0, "lse")


@pytest.mark.parametrize("size", [1000.0, -1000.0])
@pytest.mark.parametrize("rows", [2, 140])
def test_huge_scores_stay_finite(kind, size, rows):
    size = size / 16 if kind.dtype == torch.float16 else size  # else the key's true gradient is beyond 65504
    query = torch.full((1, 2, rows, 16), size).to(kind.dtype).requires_grad_()
    key = torch.randn(1, 1, 230, 16).sign().to(kind.dtype).requires_grad_()
    value = torch.randn(1, 1, 230, 16).to(kind.dtype).requires_grad_()
    out, lse = attend(query, key, value, scale=1.0, is_causal=True, kernel="cpu_fused")
    (out.float().sum() + lse.sum()).backward()
    for tensor in (out, lse, query.grad, key.grad, value.grad):
        assert tensor.isfinite().all()


@pytest.mark.parametrize("rows", [3, 150])
def test_the_shift_moves_when_later_scores_are_far_larger(kind, rows):
    """The maximum is taken from the first tile: needles hundreds of powers of two above it must still win."""
    query, key, value = sharp_inputs(1, 2, 2, rows, 400, 32, dtype=kind.dtype, sharpness=0.5)
    key[:, :, 161] = 40 * query[:, :, 1].sign()
    key[:, :, 333] = 80 * query[:, :, 2].sign()
    visible = torch.ones(1, 1, rows, 400, dtype=torch.bool)
    ref, ref_lse = dense_attention(query.double(), key.double(), value.double(), visible)
    low, low_lse = dense_attention(query, key, value, visible)
    assert ref_lse[0, :, 2].min() - ref_lse[0, :, 0].max() > 60  # past the limit of 2**60
    out, lse = attend(query, key, value, kernel="cpu_fused")
    assert_close_to_reference(out, low, ref)
    assert_close_to_reference(lse, low_lse, ref_lse)


@pytest.mark.parametrize("rows", [3, 40])
def test_every_float16_is_read_and_written_exactly(kind, rows):
    """A row that sees one key gives its value back, subnormal numbers and infinity as well, and NaN as NaN."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.float16).reshape(256, 1, 1, 256)
    query = torch.zeros(256, 1, rows, 16, dtype=torch.float16)
    out = attend(query, query[:, :, :1], every, kernel="cpu_fused").out
    assert torch.equal(
        out.nan_to_num(7, torch.inf, -torch.inf), every.expand_as(out).nan_to_num(7, torch.inf, -torch.inf)
    )


@pytest.mark.parametrize("rows", [3, 40])
def test_float16_rounds_and_overflows_as_pytorch(kind, rows):
    """Gradients of value are sums of `rows` of grad_out: ties between two float16, and sums from 65520 on."""
    value = torch.zeros(1, 1, 1, 256, dtype=torch.float16, requires_grad=True)
    query = torch.zeros(1, 1, rows, 16, dtype=torch.float16)
    grad = torch.zeros(1, 1, rows, 256)
    grad[:, :, 0] = torch.cat([torch.tensor([65504.0, -65504, 65504, 1, 1025, 2**-24, -(2**-24)]), torch.randn(249)])
    grad[:, :, 1, :6] = torch.tensor([16.0, -16, 15.5, 2**-11, 0.5, 2**-24])
    grad = grad.half()
    attend(query, query[:, :, :1], value, kernel="cpu_fused").out.backward(grad)
    assert torch.equal(value.grad, grad.float().sum(2, keepdim=True).half())
    assert value.grad[0, 0, 0, :3].tolist() == [torch.inf, -torch.inf, 65504]


@pytest.mark.parametrize("rows", [2, 200])
@pytest.mark.parametrize("bits", [0x7FC00000, -1, 0x7F800001])
def test_a_nan_reaches_the_rows_that_see_it_and_no_other(kind, rows, bits):
    query, key, value = sharp_inputs(1, 1, 1, rows, 900, 16, dtype=kind.dtype)
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32).to(kind.dtype)
    query[:, :, 1] = nan
    out, lse = attend(query, key, value, is_causal=True, kernel="cpu_fused")
    assert out[0, 0, 1].isnan().all() and lse[0, 0, 1].isnan()
    others = torch.arange(rows) != 1
    assert out[0, 0, others].isfinite().all() and lse[0, 0, others].isfinite().all()
    query[:, :, 1] = 1
    key[:, :, :512] = nan
    assert attend(query, key, value, kernel="cpu_fused").out.isnan().all()


@pytest.mark.parametrize("rows", [2, 200])
def test_scores_of_minus_infinity_are_no_keys(kind, rows):
    query, key, value = sharp_inputs(1, 1, 1, rows, 230, 16, dtype=kind.dtype)
    query[..., 0], key[..., 0] = 1, 0
    key[:, :, 100:, 0] = -torch.inf

    ours, part = (
        attend(query, k, v, kernel="cpu_fused") for k, v in ((key, value), (key[:, :, :100], value[:, :, :100]))
    )
    assert torch.equal(ours.out, part.out) and torch.equal(ours.lse, part.lse)
    key[..., 0] = -torch.inf
    out, lse = attend(query, key, value, kernel="cpu_fused")
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_any_layout_gives_the_same_bits_and_so_does_a_second_call(kind):
    query, key, value = (torch.randn(2, 170, 3, 32).to(kind.dtype).transpose(1, 2) for _ in range(3))
    grad = torch.randn(2, 3, 170, 32).to(kind.dtype).mT.contiguous().mT

    def everything(*inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, lse = attend(*leaves, is_causal=True, kernel="cpu_fused")
        return [out, lse, *torch.autograd.grad([out, lse], leaves, [grad, torch.ones_like(lse)])]

    before = torch.get_num_threads()
    outputs = []
    try:
        for threads in (1, 2, 4, 5):
            torch.set_num_threads(threads)
            expected = everything(*(x.contiguous() for x in (query, key, value)))
            for _ in range(2):
                assert all(map(torch.equal, everything(query, key, value), expected))
            outputs.append(expected[:2])
    finally:
        torch.set_num_threads(before)
    for other in outputs[1:]:
        assert all(map(torch.equal, other, outputs[0]))  # forward: for any number of threads
    flipped = query.mT.contiguous().mT  # elements of a row apart
    assert torch.equal(attend(flipped, key, value, is_causal=True, kernel="cpu_fused").out, outputs[0][0])


def test_threads_that_share_a_key_head(kind):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert call._parts(2, 4, 3) == 3
        inputs = sharp_inputs(1, 4, 2, 210, 330, 32, dtype=kind.dtype)
        check_call(inputs, Mask(causal=True), visibility(210, 330, is_causal=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("key_heads", "blocks", "threads", "parts"),
    [
        (8, 9, 2, 1),
        (3, 9, 2, 2),
        (1, 9, 2, 2),
        (1, 1, 2, 1),
        (3, 99, 64, 8),
        (9, 99, 4, 2),
        (5, 99, 16, 8),
        (1, 0, 1, 1),
    ],
)
def test_parts_are_as_few_as_keep_all_threads_busy(key_heads, blocks, threads, parts):
    assert call._parts(key_heads, blocks, threads) == parts


def test_sizes_in_python_are_those_in_c():
    folder = Path(call.__file__).parent / "float32"
    defined: dict[str, str] = {}
    for source in folder.glob("*.[ch]"):
        defined |= dict(re.findall(r"^#define (\w+) +(\d+)", source.read_text(), re.MULTILINE))
    assert int(defined["MAX_DIM"]) == call.MAX_DIM and int(defined["MAX_ROWS"]) == call.MAX_ROWS
    stored = re.search(r"enum { (\w+), (\w+), (\w+) };", (folder / "vec.h").read_text())
    assert [name.lower() for name in stored.groups()] == [str(dtype)[6:] for dtype in instruction_sets.STORED]
    for one in instruction_sets.SETS:
        if one.folder == "float32":
            assert (one.lanes, one.split_keys) == (int(defined["LANES"]), int(defined["SPLIT_KEYS"]))
    assert int(defined["SPLIT_KEYS"]) % int(defined["LANES"]) == 0


def test_an_unknown_instruction_set_is_refused():
    query, refused = torch.randn(1, 1, 100, 16), "HF_ATTN_PLUGINS_INSTRUCTIONS='avx3' is unknown: choose one of amx"
    with allowing("avx3"), pytest.raises(ValueError, match=refused):
        attend(query, query, query, kernel="cpu_fused")


def test_a_cpu_without_any_of_them_is_told_so(monkeypatch):
    monkeypatch.setattr(instruction_sets, "cpu_has", lambda feature: False)
    reason = instruction_sets.best.__wrapped__(torch.bfloat16)
    if instruction_sets.platform.machine().lower() in instruction_sets.X86:
        assert reason == "this CPU has none of the instruction sets AMX, AVX512-BF16, AVX-512, AVX2, Arm NEON"
    assert "not made for torch.float64" in instruction_sets.best.__wrapped__(torch.float64)


FUZZ = 150


@pytest.mark.grid
@pytest.mark.parametrize("seed", range(FUZZ))
def test_fuzz(kind, seed):
    inputs, fields = drawn(seed, kind.dtype)
    rows, keys = inputs[0].shape[2], inputs[1].shape[2]
    visible = visibility(rows, keys, **fields)
    check_call(inputs, as_mask(fields), visible, seed=seed, luck=3.0, **drawn_changes(seed, inputs))


@pytest.fixture(scope="module", params=["WIDTH=4", "WIDTH=8", "WIDTH=16", "ALWAYS_TOGETHER"])
def other_sources(request, tmp_path_factory):
    """The sources with vectors of another width than the instruction set's: the compiler splits or pads them. Or with
    more queries walking together, which else takes sizes that a fuzz has no time for."""
    chosen = instruction_sets.best(torch.float32)
    compiler = next(filter(None, map(shutil.which, build.COMPILERS)))
    path = tmp_path_factory.mktemp("other") / f"{request.param}.so"
    build.compile_library(compiler, chosen, path, f"-D{request.param}")
    return chosen, build.ctypes.CDLL(str(path))


@pytest.mark.grid
@pytest.mark.parametrize("seed", range(0, FUZZ, 2))
@pytest.mark.parametrize("dtype", instruction_sets.STORED, ids=str)
def test_fuzz_of_other_sources(other_sources, monkeypatch, seed, dtype):
    """AVX-512 has 16 floats a vector, NEON 4: any CPU can check their sizes of tiles, but not their instructions."""
    monkeypatch.setattr(call, "_checked", lambda dtype, most: other_sources)
    test_fuzz(Kind("", dtype), seed)


@pytest.mark.grid
@pytest.mark.parametrize("seed", range(40))
def test_fuzz_of_plans(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    rows, keys = (int(n) for n in torch.randint(1, 400, (2,), generator=generator))
    row_cuts, key_cuts = (sorted({0, n, *torch.randint(n, (4,), generator=generator).tolist()}) for n in (rows, keys))
    plan = [
        Rectangle(r0, r1, k0, k1, bool(torch.rand((), generator=generator) < 0.5))
        for r0, r1 in itertools.pairwise(row_cuts)
        for k0, k1 in itertools.pairwise(key_cuts)
        if torch.rand((), generator=generator) < 0.6
    ]
    inputs = sharp_inputs(2, 4, 2, rows, keys, 32, 16, dtype=kind.dtype, seed=seed)
    check_call(inputs, Mask(causal=True), seen_by(plan, 2, rows, keys, keys - rows), [plan], luck=3.0)
    empty = attend_rectangles(*inputs, [[]], mask=Mask(causal=True), kernel="cpu_fused")
    assert (empty.lse == -torch.inf).all()
