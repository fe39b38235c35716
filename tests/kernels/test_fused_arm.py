"""The compiled kernels cross-compiled for 64-bit Arm (NEON) and run in an emulator, against the definition.

Debian: `apt-get install gcc-aarch64-linux-gnu qemu-user`. This checks numbers; it says nothing about speed.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

from hf_attn_plugins.core.drops import ROOM
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.kernels.cpu_fused import build, call, layout
from hf_attn_plugins.kernels.cpu_fused.instruction_sets import SETS, STORED
from hf_attn_plugins.testing import sharp_inputs, visibility
from tests.kernels import test_fused_dropout as dropping
from tests.kernels import test_fused_float32 as storage
from tests.kernels.fused_cases import Kind, check_call, drawn, drawn_changes
from tests.kernels.test_attend import MASKS, as_mask
from tests.kernels.test_attend_rectangles import STAR, seen_by

COMPILER, EMULATOR = "aarch64-linux-gnu-gcc", "qemu-aarch64"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which(COMPILER) and shutil.which(EMULATOR)), reason=f"{COMPILER} and {EMULATOR}"),
]
NEON = next(one for one in SETS if one.name == "neon")
FUNCTIONS = ("hap_forward", "hap_backward", "hap_decode")


class Emulated:
    """Stands for the loaded library: every call runs in the emulator, with copies of what `CallStruct` points to."""

    def __init__(self, program: Path) -> None:
        self.program = program

    def __getattr__(self, name: str):
        return lambda argument: self._run(FUNCTIONS.index(name), argument._obj)

    def _run(self, function: int, passed: layout.CallStruct) -> None:
        pointers = {offset: (at, size) for offset, at, size in _pointers(passed) if at and size}
        head = struct.pack("<qq", function, ctypes.sizeof(passed)) + bytes(passed) + struct.pack("<q", len(pointers))
        body = [struct.pack("<qq", o, size) + ctypes.string_at(at, size) for o, (at, size) in pointers.items()]
        done = subprocess.run([EMULATOR, self.program], input=head + b"".join(body), capture_output=True, timeout=300)
        assert done.returncode == 0, (done.returncode, done.stderr)
        begin = 0
        for at, size in pointers.values():
            ctypes.memmove(at, done.stdout[begin : begin + size], size)
            begin += size
        assert begin == len(done.stdout)


def _pointers(c: layout.CallStruct):
    """(offset in the struct, address, bytes) of every pointer of a call."""
    size = 4 if c.dtype == 0 else 2
    rows, keys = (c.heads, c.num_rows), (c.kv_heads, c.num_keys)
    of = {"query": (*rows, c.dim), "key": (*keys, c.dim), "value": (*keys, c.dim_v), "out": (*rows, c.dim_v)}
    of |= {f"grad_{name}": shape for name, shape in of.items()}
    for name, (heads, tokens, dim) in of.items():
        x = getattr(c, name)
        elements = (c.batch - 1) * x.batch + (heads - 1) * x.head + (tokens - 1) * x.token + dim
        yield getattr(layout.CallStruct, name).offset, x.data, elements * size
    cells = c.batch * c.heads * c.num_rows
    chunks, shared = math.ceil(c.num_keys / NEON.split_keys), c.heads // c.kv_heads * c.num_rows
    partials = max(
        c.parts * cells * c.dim, c.batch * c.kv_heads * (chunks * shared * (c.dim_v + 2) + 1) * (c.parts == 0)
    )
    row_blocks, key_blocks = (math.ceil(n / NEON.lanes) for n in (c.num_rows, c.num_keys))
    flat = {
        "row_hashes": cells + ROOM, "key_hashes": c.batch * c.num_keys + ROOM,
        "lse": cells, "grad_lse": cells, "delta": cells, "lse_rest": cells,
        "row_labels": c.row_labels_batch * (c.batch - 1) + c.num_rows,
        "key_labels": c.key_labels_batch * (c.batch - 1) + c.num_keys,
        "row_bounds": c.row_bounds_batch * (c.batch - 1) + 4 * row_blocks,
        "key_bounds": c.key_bounds_batch * (c.batch - 1) + 4 * key_blocks,
        "row_pieces": c.row_pieces_batch * (c.batch - 1) + 6 * row_blocks * c.row_pieces_most,
        "key_pieces": c.key_pieces_batch * (c.batch - 1) + 6 * key_blocks * c.key_pieces_most,
        "grad_bias": c.grad_bias_batch * (c.batch - 1) + c.grad_bias_head * (c.heads - 1) + c.num_rows * c.num_keys,
        "partials": partials - (c.parts > 0 and c.dtype == 0) * cells * c.dim,
    }  # fmt: skip
    for name, elements in flat.items():
        yield getattr(layout.CallStruct, name).offset, getattr(c, name), 4 * elements
    ends = (
        c.bias_batch * (c.batch - 1),
        c.bias_head * (c.heads - 1),
        c.bias_row * (c.num_rows - 1),
        c.bias_key * (c.num_keys - 1),
    )
    yield layout.CallStruct.bias.offset, c.bias, (sum(ends) + 1) * layout.BIASES[c.bias_dtype].itemsize


@pytest.fixture(scope="module")
def emulated(tmp_path_factory) -> Emulated:
    folder = Path(call.__file__).parent
    program = tmp_path_factory.mktemp("arm") / "call"
    sources = [Path(__file__).parent / "emulated_call.c", *sorted((folder / NEON.folder).glob("*.c"))]
    flags = [flag for flag in build.FLAGS if flag not in ("-shared", "-fPIC")]
    command = [COMPILER, *flags, *NEON.flags, "-static", f"-I{folder}", *map(str, sources), "-o", str(program), "-lm"]
    subprocess.run(command, check=True, timeout=300)
    return Emulated(program)


@pytest.fixture(autouse=True)
def on_arm(emulated, monkeypatch):
    monkeypatch.setattr(call, "_checked", lambda dtype, most: (NEON, emulated))
    monkeypatch.setattr(call, "unavailable", lambda dtype: None)


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", [(3, 590), (130, 201)], ids=str)
def test_forward_gradients_and_decoding(dtype, name, shape):
    fields = MASKS[name](2, *shape)
    check_call(sharp_inputs(2, 4, 2, *shape, 32, 48, dtype=dtype), as_mask(fields), visibility(*shape, **fields))


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_a_plan(dtype):
    inputs = sharp_inputs(3, 2, 1, 50, 50, 16, dtype=dtype)
    check_call(inputs, Mask(causal=True), seen_by(STAR, 3, 50, 50, 0), [STAR])


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("rows", [1, 5])
def test_decoding_finds_the_bounds_of_labels(dtype, rows):
    """Batches padded on the left, on the right, everywhere; blocks of 96 keys hidden whole, in part, not at all."""
    real = torch.ones(3, 590, dtype=torch.bool)
    real[0, :210], real[1, 333:], real[2] = False, False, False
    inputs = sharp_inputs(3, 4, 2, rows, 590, 32, 48, dtype=dtype)
    check_call(inputs, Mask(key_padding=real), visibility(rows, 590) & real[:, None, None])


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_fuzz(dtype, seed):
    inputs, fields = drawn(seed, dtype)
    visible = visibility(inputs[0].shape[2], inputs[1].shape[2], **fields)
    check_call(inputs, as_mask(fields), visible, seed=seed, luck=3.0, **drawn_changes(seed, inputs))


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("rows, softcap", [(97, None), (40, 8.0)])
def test_dropout_with_a_mask_tensor_or_a_softcap(dtype, rows, softcap):
    dropping.test_out_and_gradients(Kind("neon", dtype), rows, softcap)


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("softcap", [0.5, 50.0])
@pytest.mark.parametrize("rows", [3, 90])
def test_softcap(dtype, softcap, rows):
    inputs = sharp_inputs(1, 4, 2, rows, 150, 64, dtype=dtype)
    check_call(inputs, Mask(causal=True), visibility(rows, 150, is_causal=True), softcap=softcap)


@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("of", [torch.bool, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [3, 97])
def test_mask_tensors(dtype, of, rows):
    inputs = sharp_inputs(2, 4, 2, rows, 130, 32, dtype=dtype)
    bias = torch.randn(2, 4, rows, 130, generator=torch.Generator().manual_seed(rows))
    bias = bias > -0.5 if of == torch.bool else bias.masked_fill(bias < -1, -torch.inf).to(of).requires_grad_()
    check_call(inputs, Mask(), visibility(rows, 130), bias=bias)


def test_every_float16_is_read_and_written_exactly():
    for rows in (3, 40):
        storage.test_every_float16_is_read_and_written_exactly(Kind("neon", torch.float16), rows)
        storage.test_float16_rounds_and_overflows_as_pytorch(Kind("neon", torch.float16), rows)
