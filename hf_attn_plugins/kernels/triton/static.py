"""Resources of the compiled Triton kernels, without a GPU: registers, spills, shared memory, matrix instructions.

The launches of a call are recorded on meta tensors (`device.recording`) and compiled ahead of time for each target,
specialised as Triton's own launcher does it. The resources are read from the binaries.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_attn_plugins.kernels.triton.device import Launch, recording
from hf_attn_plugins.kernels.triton.launch import Call, backward, forward, override
from hf_attn_plugins.kernels.triton.tuning import configuration

TOKENS, HEADS, KV_HEADS = 16384, 32, 8


@dataclass(frozen=True)
class Chip:
    """A compile target and its limits.

    Attributes:
        backend, arch, warp: Triton's names of the target, and threads of a warp.
        block_shared, chip_shared: bytes of shared memory that one block and one multiprocessor have.
        peak: dense bfloat16 matrix TFLOP/s from the vendor's data sheet (A100, H100, B200, RTX 5090, MI300X, MI355X).
    """

    backend: str
    arch: int | str
    warp: int
    block_shared: int
    chip_shared: int
    peak: float


CHIPS = {
    "sm80": Chip("cuda", 80, 32, 163 * 1024, 164 * 1024, 312.0),
    "sm90": Chip("cuda", 90, 32, 227 * 1024, 228 * 1024, 989.0),
    "sm100": Chip("cuda", 100, 32, 227 * 1024, 228 * 1024, 2250.0),
    "sm120": Chip("cuda", 120, 32, 99 * 1024, 100 * 1024, 209.5),
    "gfx942": Chip("hip", "gfx942", 64, 64 * 1024, 64 * 1024, 1307.0),
    "gfx950": Chip("hip", "gfx950", 64, 160 * 1024, 160 * 1024, 2500.0),
}
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "u1",
}  # fmt: skip
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
PRODUCTS = {"forward_kernel": 2, "decode_kernel": 2, "dq_kernel": 3, "dkdv_kernel": 4}  # matrix products a score


@dataclass(frozen=True)
class Resources:
    """One compiled kernel.

    Attributes:
        registers: per thread; spilled: bytes of stack per thread; shared: bytes per block.
        matrix: tensor-core instructions in the binary, by name.
        resident: blocks that fit on one multiprocessor; None where the target's rules are not modelled (AMD).
        floor_ms: milliseconds of arithmetic in a call of TOKENS tokens at the data sheet's peak: a lower bound.
    """

    kernel: str
    target: str
    dtype: str
    head_dim: int
    causal: bool
    tile: str
    registers: int
    spilled: int
    shared: int
    matrix: dict[str, int]
    resident: int | None
    floor_ms: float | None


def record(
    target: str, dtype: torch.dtype, head_dim: int, causal: bool, tma: bool = False, **features: Any
) -> list[Launch]:
    """The launches of a prefill with its backward, and of one decoding step, with the target's tile sizes.

    Args:
        target: one of `CHIPS`.
        dtype, head_dim, causal: of query, key and value, and whether the mask is causal.
        tma: the forward loads by TMA descriptors, whatever the tuning table says.
        features: other fields of `launch.Call`.
    """
    plain = Call(head_dim**-0.5, None, None, 0 if causal else None, 0, None, None, 0.0, None, None, ())
    call = plain._replace(**features)

    def tensor(heads: int, tokens: int) -> torch.Tensor:
        return torch.empty(1, tokens, heads, head_dim, dtype=dtype, device="meta").transpose(1, 2)

    query, key = tensor(HEADS, TOKENS), tensor(KV_HEADS, TOKENS)
    if tma:
        override["forward"] = configuration(target, "forward", dtype, head_dim, causal)._replace(tma=True)
    try:
        with recording(target) as launches:
            out, _, row_lse = forward(query, key, key, call)
            backward(out, None, query, key, key, out, row_lse, call)
            forward(tensor(HEADS, 1), key, key, call._replace(offset=TOKENS - 1, pieces=()))  # only prompts have plans
    finally:
        override.clear()
    return launches


def compile_launch(launch: Launch, target: str) -> Any:
    """`triton.compile` of one recorded launch.

    Raises:
        TypeError: the arguments are not those of the kernel.
        Exception: whatever the compiler raises.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    chip = CHIPS[target]
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    values = dict(launch.arguments)
    options = {name: values.pop(name) for name in ("num_warps", "num_stages") if name in values}
    names = launch.kernel.arg_names
    if set(values) != set(names):
        differing = sorted(set(values) ^ set(names))
        raise TypeError(f"{launch.kernel.__name__} and its launch differ in the arguments {', '.join(differing)}.")
    for index, name in enumerate(names):
        value = values[name]
        kind = "constexpr" if launch.kernel.params[index].is_constexpr else _type(value)
        signature[name] = kind
        if kind == "constexpr":
            constants[(index,)] = value
        elif kind.startswith("*") or (isinstance(value, int) and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget(chip.backend, chip.arch, chip.warp), options=options)


def _type(value: Any) -> str:
    """An argument's type in Triton's signature, as Triton's launcher specialises it."""
    if isinstance(value, torch.Tensor):
        return "*" + TYPES[value.dtype]
    if value is None or (isinstance(value, int) and value == 1):
        return "constexpr"
    return "fp32" if isinstance(value, float) else "i32"


def measure(launch: Launch, target: str, dtype: str, head_dim: int, causal: bool) -> Resources:
    """Compile one launch and read its binary."""
    compiled = compile_launch(launch, target)
    chip, name, words = CHIPS[target], launch.kernel.__name__, launch.arguments
    registers, spilled, matrix = (_read_amd if chip.backend == "hip" else _read_nvidia)(compiled)
    shared = compiled.metadata.shared
    floor = None
    if name in PRODUCTS and name != "decode_kernel" and dtype != "fp32":
        pairs = HEADS * TOKENS * TOKENS / (2 if causal else 1)
        floor = round(pairs * 2 * head_dim * PRODUCTS[name] / chip.peak / 1e9, 3)
    sizes = [f"{words[part]}" for part in ("BLOCK_M", "BLOCK_N") if part in words]
    tile = "x".join(sizes) + f", {words['num_warps']} warps, {words.get('num_stages', 1)} stages"
    tile += ", TMA" if words.get("TMA") else ""
    resident = None if chip.backend == "hip" else resident_blocks(registers, shared, words["num_warps"], chip)
    return Resources(
        name.removesuffix("_kernel"), target, dtype, head_dim, causal, tile, registers, spilled, shared, matrix,
        resident, floor,
    )  # fmt: skip


def resident_blocks(registers: int, shared: int, warps: int, chip: Chip) -> int:
    """Blocks that fit on one NVIDIA multiprocessor.

    It has 65,536 registers, which a warp takes in units of 256, 64 warps, 32 blocks, and the chip's shared memory, of
    which the driver takes 1 KiB per block.
    """
    by_registers = 65536 // (-(-registers * 32 // 256) * 256 * warps)
    by_shared = chip.chip_shared // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32)


def _read_nvidia(compiled: Any) -> tuple[int, int, dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        sass = _tool("cuobjdump", "-sass", str(cubin))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage[-300:]!r}")
    matrix = Counter(re.findall(r"\b(HGMMA|HMMA|UTC\w*MMA)\b", sass))
    return int(found[1]), int(found[2]), dict(matrix)


def _read_amd(compiled: Any) -> tuple[int, int, dict[str, int]]:
    text = compiled.asm["amdgcn"]

    def number(field: str) -> int:
        found = re.search(rf"\.{field}:\s*(\d+)", text)
        if found is None:
            raise RuntimeError(f"the AMD assembly has no .{field}")
        return int(found[1])

    return number("vgpr_count"), number("private_segment_fixed_size"), dict(Counter(re.findall(r"\b(v_mfma)_", text)))


def _tool(name: str, *arguments: str) -> str:
    """Run one of the NVIDIA tools in Triton's wheel."""
    from triton import knobs

    path = getattr(knobs.nvidia, name).path
    return subprocess.run([path, *arguments], capture_output=True, text=True, check=True).stdout


def report(
    targets: list[str], dtypes: list[str], head_dims: list[int], causal: list[bool], kernels: list[str] | None = None
) -> Iterator[Resources]:
    """`measure` of every kernel for all combinations of the arguments.

    `kernels` are names without "_kernel"; None means all. Where the chip has TMA, the forward is measured with it, too.
    """
    for target, dtype, head_dim, banded in itertools.product(targets, dtypes, head_dims, causal):
        launches = record(target, DTYPES[dtype], head_dim, banded)
        if target in ("sm90", "sm100"):
            launches.insert(1, record(target, DTYPES[dtype], head_dim, banded, tma=True)[0])
        for launch in launches:
            if kernels is None or launch.kernel.__name__.removesuffix("_kernel") in kernels:
                yield measure(launch, target, dtype, head_dim, banded)


def problems(rows: list[Resources]) -> list[str]:
    """One line per requirement that a row does not meet.

    Required everywhere: shared memory within the chip's limit. For bfloat16 at head_dim 64 and 128: no spills in the
    forward on NVIDIA and in the backward on sm90, and HGMMA in the forward on sm90.
    """
    found = []
    for row in rows:
        where = f"{row.kernel} {row.target} {row.dtype} head_dim {row.head_dim} {'causal' if row.causal else 'full'}"
        if row.shared > CHIPS[row.target].block_shared:
            found.append(f"{where}: {row.shared} bytes of shared memory, the chip has {CHIPS[row.target].block_shared}")
        if row.dtype != "bf16" or row.head_dim > 128 or row.target.startswith("gfx"):
            continue
        strict = row.kernel == "forward" or (row.kernel in ("dq", "dkdv") and row.target == "sm90")
        if strict and row.spilled:
            found.append(f"{where}: {row.spilled} bytes spilled")
        if row.kernel == "forward" and row.target == "sm90" and not row.matrix.get("HGMMA"):
            found.append(f"{where}: no HGMMA")
    return found


def as_json(rows: list[Resources]) -> list[dict[str, Any]]:
    """The rows as plain dictionaries."""
    return [dataclasses.asdict(row) for row in rows]
