"""What can be proven of the Triton kernels without a GPU, beyond right numbers in order, on tidy tensors, in float32.

* Programs of a launch in any order: the same bits, with NaN in all memory that is to be written.
* Nothing outside of a tensor is touched: every tensor of a launch stands between pages that may not be read.
* Offsets beyond 2**31 elements, in views of memory that is reserved and never filled.
* bfloat16: products whose operands are rounded to bfloat16, as on a GPU, by the error rule and against the C kernels.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys

import pytest
import torch

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.kernels import attend, attend_rectangles
from hf_attn_plugins.kernels.cpu_fused import build as fused
from hf_attn_plugins.testing import allowed_error, dense_attention, visibility
from tests.kernels.triton_cases import check, draw, needs_interpreter, padding, segments

pytestmark = needs_interpreter

FEATURES = {
    "causal and padding": (19, 19, dict(causal=True, key_padding=padding(2, 19)), {}),
    "decode": (2, 40, dict(causal=True), {}),
    "full": (17, 35, {}, {}),
    "window and prefix": (33, 33, dict(causal=True, window=(9, None), prefix=5), {}),
    "segments": (20, 20, dict(causal=True, query_segments=segments(2, 20), key_segments=segments(2, 20)), {}),
    "softcap": (17, 20, dict(causal=True), dict(softcap=4.0)),
    "float bias": (17, 20, dict(bias=torch.linspace(-1, 1, 340).view(17, 20)), {}),
    "an offset in a tensor": (18, 40, dict(causal=True, offset=torch.tensor(11)), {}),
    "decode with labels": (3, 70, dict(causal=True, key_padding=padding(2, 70)), {}),
    "plan": (33, 33, dict(causal=True), {}),
    "odd head_dim": (17, 19, dict(causal=True), dict(dims=(20, 12))),
}
PLAN = [Rectangle(0, 16, 0, 16, True), Rectangle(16, 33, 0, 5), Rectangle(16, 33, 5, 33, True)]
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="memory is mapped by Linux's calls")
QUICK = ("decode",)
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.grid) for name in FEATURES]


def computed(name, inputs=None):
    """out, lse and gradients of a feature."""
    rows, keys, fields, options = FEATURES[name]
    options = dict(options)
    dims = options.pop("dims", (16, 16))
    inputs = inputs or draw(2, rows, keys, dims=dims)
    leaves = [x.detach().requires_grad_() for x in inputs]
    mask = Mask(**fields)
    if name == "plan":
        out, lse = attend_rectangles(*leaves, PLAN, mask=mask.replace(offset=0), kernel="triton")
    else:
        out, lse = attend(*leaves, mask=mask, kernel="triton", **options)
    loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() + lse.clamp_min(-1e4).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("name", NAMES)
def test_programs_run_in_any_order(monkeypatch, name):
    from triton.runtime.interpreter import InterpreterBuilder

    from hf_attn_plugins.kernels.triton import launch as triton_launch

    plain = triton_launch.empty
    monkeypatch.setattr(triton_launch, "empty", lambda *size, **kinds: plain(*size, **kinds).fill_(float("nan")))
    expected, moved = computed(name), []

    def shuffled(builder, x, y, z):
        order = torch.randperm(builder.grid_dim[0], generator=torch.Generator().manual_seed(builder.grid_dim[0]))
        builder.grid_idx = (int(order[x]), y, z)
        moved.append(builder.grid_idx[0] != x)

    monkeypatch.setattr(InterpreterBuilder, "set_grid_idx", shuffled)
    for one, other in zip(computed(name), expected, strict=True):
        assert torch.equal(one, other)
    assert any(moved)


# Guard pages. They run in processes of their own: what they catch ends the process.

PAGE = mmap.PAGESIZE
PRIVATE, NORESERVE = 0x22, 0x4000  # private and anonymous; and counted only when it is written
NOTHING, READ_WRITE = 0, 3


def mapped(size: int, access: int, flags: int = PRIVATE) -> int:
    """The address of new memory, by Linux's own call."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, *[ctypes.c_size_t] * 5]
    address = libc.mmap(None, size, access, flags, 2**64 - 1, 0)
    if address in (None, 2**64 - 1):
        raise OSError(ctypes.get_errno(), "mmap")
    return address


def tensor_at(address: int, size: int) -> torch.Tensor:
    """The bytes at an address."""
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=torch.uint8)


class Guarded:
    """Copies of tensors whose first or last byte is next to a page that may be neither read nor written."""

    def __init__(self, at_end: bool) -> None:
        self.at_end, self.libc = at_end, ctypes.CDLL(None)

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy with the same strides; what lies between its elements is NaN."""
        if not tensor.numel():
            return tensor
        size = tensor.element_size()
        length = (sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True)) + 1) * size
        pages = -(-length // PAGE)
        start = mapped((pages + 2) * PAGE, NOTHING)
        assert self.libc.mprotect(ctypes.c_void_p(start + PAGE), ctypes.c_size_t(pages * PAGE), READ_WRITE) == 0
        first = start + PAGE + (pages * PAGE - length if self.at_end else 0)
        flat = tensor_at(first, length).fill_(255).view(tensor.dtype)
        once = [1 if step == 0 else n for n, step in zip(tensor.shape, tensor.stride(), strict=True)]
        flat.as_strided(once, tensor.stride()).copy_(tensor.as_strided(once, tensor.stride()))
        return flat.as_strided(tensor.shape, tensor.stride())


def guard_launches(at_end: bool, more_keys: int = 0) -> None:
    """Give every launch copies of its tensors between guard pages; `more_keys` plants a wrong number of keys."""
    from hf_attn_plugins.kernels.triton import backward, decode, dkdv, dq, forward  # noqa: F401
    from hf_attn_plugins.kernels.triton import launch as triton_launch

    guarded, plain = Guarded(at_end), triton_launch.launch

    def launch(kernel, grid, /, **arguments):
        tensors = {name: given for name, given in arguments.items() if isinstance(given, torch.Tensor)}
        copies = {name: guarded.copy(tensor.detach()) for name, tensor in tensors.items()}
        if "num_keys" in arguments:
            arguments["num_keys"] += more_keys
        plain(kernel, grid, **(arguments | copies))
        for name, tensor in tensors.items():
            if not any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
                tensor.detach().copy_(copies[name])

    triton_launch.launch = launch


GUARDED = """
import sys, torch
from tests.kernels import test_triton_proof as proof
name, at_end, more_keys = sys.argv[1], sys.argv[2] == "end", int(sys.argv[3])
expected = proof.computed(name)
proof.guard_launches(at_end, more_keys)
found = proof.computed(name)
assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
print("untouched")
"""


def between_pages(name: str, where: str, more_keys: int = 0) -> subprocess.CompletedProcess[str]:
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    return subprocess.run(
        [sys.executable, "-c", GUARDED, name, where, str(more_keys)], capture_output=True, text=True, cwd=root
    )


@LINUX
@pytest.mark.parametrize("where", ["begin", "end"])
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.grid) for name in FEATURES])
def test_nothing_outside_of_a_tensor_is_touched(name, where):
    done = between_pages(name, where)
    assert done.returncode == 0 and "untouched" in done.stdout, (done.returncode, done.stderr[-2000:])


@LINUX
@pytest.mark.grid
def test_guard_pages_catch_a_planted_fault():
    assert between_pages("full", "end", more_keys=1).returncode == -11  # SIGSEGV


# Offsets beyond 2**31.


@pytest.fixture(scope="module")
def reserved():
    """A view of float16 memory with 2**33 elements, of which only what is written takes place."""
    try:
        return tensor_at(mapped(2**34, READ_WRITE, PRIVATE | NORESERVE), 2**34).view(torch.float16)
    except OSError as error:
        pytest.skip(f"no address space of 16 GiB: {error}")


SPREAD = {  # strides of batch, heads and tokens, in elements; 16 head dims are neighbours
    "batch": (2**31 + 32, 4096, 16),
    "heads": (16 * 48, 2**31 + 32, 16),
    "tokens": (32, 16, 2**27),  # within a tile 15 * 2**27 < 2**31; between tiles more
}


def far_apart(reserved, name, *tensors):
    """Copies whose elements are more than 2**31 apart."""
    far = []
    for place, near in enumerate(tensors):
        far.append(reserved[place * 2048 :].as_strided(near.shape, (*SPREAD[name], 1)).copy_(near))
    assert max((n - 1) * step for n, step in zip(near.shape, far[0].stride(), strict=True)) >= 2**31
    return far


@LINUX
@pytest.mark.parametrize("rows", [1, pytest.param(17, marks=pytest.mark.grid)])
@pytest.mark.parametrize("name", SPREAD)
def test_offsets_beyond_32_bits(reserved, name, rows):
    """A cache of more than 2**31 elements: keys and values far apart give the same bits as those side by side."""
    query, key, value = (x.half() for x in draw(2, rows, 40, heads=(2, 2)))
    far = far_apart(reserved, name, key, value)
    near = attend(query, key, value, is_causal=True, kernel="triton")
    part = attend(query, *far, is_causal=True, kernel="triton")
    assert torch.equal(part.out, near.out) and torch.equal(part.lse, near.lse)


@LINUX
@pytest.mark.grid
@pytest.mark.parametrize("name", SPREAD)
def test_gradients_of_offsets_beyond_32_bits(reserved, name):
    near = [x.half() for x in draw(2, 17, 40, heads=(2, 2))]
    grads = []
    for inputs in (near, [near[0], *far_apart(reserved, name, *near[1:])]):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = attend(*leaves, is_causal=True, kernel="triton").out
        grads.append(torch.autograd.grad(out.float().square().sum(), leaves))
    assert all(torch.equal(one, other) for one, other in zip(*grads, strict=True))


# bfloat16.


@pytest.fixture
def bf16_products(monkeypatch):
    """Let the interpreter's products round their operands to bfloat16; it keeps tiles of bfloat16 in float32."""
    from triton.runtime.interpreter import InterpreterBuilder

    plain, rounded = InterpreterBuilder.create_dot, []

    def dot(builder, a, b, *rest):
        rounded.extend(torch.from_numpy(operand.data.copy()) for operand in (a, b))
        a, b = (type(x)(torch.from_numpy(x.data.copy()).bfloat16().float().numpy(), x.dtype) for x in (a, b))
        return plain(builder, a, b, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    return rounded


BF16 = {
    "causal": dict(is_causal=True),
    "window": dict(is_causal=True, window=(9, None)),
    "padding": dict(is_causal=True, key_padding=padding(2, 20)),
    "full": {},
}


@pytest.mark.parametrize(
    "name", [name if name == "causal" else pytest.param(name, marks=pytest.mark.grid) for name in BF16]
)
def test_bfloat16_as_a_gpu_computes_it(bf16_products, name):
    """Weights and score gradients are rounded before their products, out before the backward reads it."""
    batch = 2 if name == "padding" else 1
    check(draw(batch, 20, 20, dtype=torch.bfloat16, sharpness=2.0), BF16[name])
    assert any(not torch.equal(x, x.bfloat16().float()) for x in bf16_products)  # something was rounded


@pytest.mark.skipif(fused.unavailable() is not None, reason="the C kernels cannot run here")
@pytest.mark.parametrize("name", BF16)
def test_bfloat16_agrees_with_the_c_kernels(bf16_products, name):
    batch = 2 if name == "padding" else 1
    inputs = draw(batch, 20, 20, dtype=torch.bfloat16, sharpness=2.0)
    fields = {"causal" if key == "is_causal" else key: value for key, value in BF16[name].items()}
    found = []
    for kernel in ("triton", "cpu_fused"):
        leaves = [x.detach().requires_grad_() for x in inputs]
        part = attend(*leaves, mask=Mask(**fields), kernel=kernel)
        grads = torch.autograd.grad(part.out.float().square().sum(), leaves)
        found.append([part.out.detach(), part.lse.detach(), *grads])
    visible = visibility(20, 20, **BF16[name])
    ref, low = (dense_attention(*(x.to(d) for x in inputs), visible)[0] for d in (torch.float64, torch.bfloat16))
    limit = 2 * allowed_error(low, ref)
    assert float((found[0][0].double() - found[1][0].double()).abs().max()) <= limit
    for ours, c in zip(found[0][2:], found[1][2:], strict=True):
        assert float((ours.float() - c.float()).abs().max()) <= 0.05 * max(1.0, float(c.float().abs().max()))
