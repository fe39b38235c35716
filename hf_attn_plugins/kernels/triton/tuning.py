"""Tile sizes, warps and pipeline stages of the Triton kernels: a table, so that the first call need not time any.

The rows were chosen from the compiled binaries, not by timings: no spilled registers, and shared memory within the
chip's limit (benchmarks/results/triton_static.md). `hf-attn bench gpu --tune FILE` times candidates on the GPU of the
machine and writes FILE. With HF_ATTN_PLUGINS_TUNING=FILE the rows of FILE replace those of the table.

TMA descriptors in the forward compile for sm_90 and sm_100; `hf-attn bench triton --static` lists the forward with and
without them. The matrix instructions are the same. In bfloat16 a thread needs 33 to 57 registers fewer on sm_90 and 3
to 45 fewer on sm_100. There are no spills up to head_dim 128 (8 bytes of stack at 256, full, on sm_100). But up to
head_dim 128 no more blocks fit on a multiprocessor. So the rows below load by pointers until a GPU has timed both;
tuning tries both.

Warp specialisation (`tl.range(..., warp_specialize=True)`) is not used, because Triton 3.9 gains nothing by it. On
sm_90 (a forward loop alone) 8 warps compile to the same registers, memory and instructions, and for 4 warps the pass
NVGPUWarpSpecialization fails. On sm_100 (this forward) the pass TritonGPUHoistTMEMAlloc fails with TMA. With pointers
it compiles to as many registers (246 instead of 245 at head_dim 64, 220 instead of 222 at 128) and a tenth more shared
memory.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

ARCHITECTURES = ("sm80", "sm86", "sm90", "sm100", "gfx942")
SMALL = (86, 87, 89)  # consumer Ampere and Ada: 99 KiB of shared memory per block, where sm_80 has 163
KINDS = ("forward", "dq", "dkdv", "decode")
HEAD_DIMS = (64, 128, 256)


class Config(NamedTuple):
    """The configuration of one kernel.

    Attributes:
        block_m, block_n: rows and keys of a tile.
        num_warps: warps of a program.
        num_stages: tiles in the load pipeline.
        tma: the forward loads keys and values by TMA descriptors, where chip and strides allow it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False


def _split(sm80: Config, sm90: Config, sm100: Config, gfx942: Config, sm86: Config | None = None) -> dict[str, Config]:
    """By architecture; sm86, which stands for `SMALL`, is as sm80 where it is not given."""
    return {"sm80": sm80, "sm86": sm86 or sm80, "sm90": sm90, "sm100": sm100, "gfx942": gfx942}


# kind -> head_dim -> one Config for every architecture, or one each.
HALF: dict[str, dict[int, Config | dict[str, Config]]] = {
    "forward": {
        64: _split(
            Config(128, 64, 4, 3),
            Config(128, 128, 8, 2),
            Config(128, 64, 4, 3),
            Config(128, 64, 4, 3),
            Config(128, 64, 8, 2),
        ),
        128: _split(
            Config(128, 64, 8, 3),
            Config(128, 64, 8, 3),
            Config(128, 64, 8, 3),
            Config(128, 64, 4, 1),
            Config(64, 64, 8, 2),
        ),
        256: _split(Config(64, 32, 8, 2), Config(128, 32, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 4, 1)),
    },
    "dq": {
        64: _split(Config(64, 32, 4, 2), Config(64, 64, 4, 2), Config(128, 64, 8, 2), Config(64, 64, 4, 2)),
        128: _split(Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 32, 4, 1)),
        256: _split(Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 8, 1), Config(32, 32, 4, 1)),
    },
    "dkdv": {
        64: _split(Config(64, 128, 8, 2), Config(64, 128, 8, 2), Config(64, 128, 8, 2), Config(32, 64, 4, 1)),
        128: _split(Config(32, 64, 4, 2), Config(32, 128, 8, 2), Config(32, 128, 8, 2), Config(32, 64, 4, 1)),
        256: _split(
            Config(32, 64, 8, 1), Config(32, 32, 8, 1), Config(32, 64, 8, 1), Config(16, 32, 4, 1), Config(32, 32, 8, 1)
        ),
    },
    "decode": {64: Config(16, 64, 4, 3), 128: Config(16, 64, 4, 3), 256: Config(16, 32, 4, 2)},
}
SINGLE: dict[str, dict[int, Config | dict[str, Config]]] = {
    "forward": {
        64: Config(64, 32, 4, 2),
        128: _split(
            Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(64, 32, 8, 2), Config(32, 32, 8, 1)
        ),
        256: Config(32, 16, 8, 1),
    },
    "dq": {64: Config(32, 32, 4, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    "dkdv": {64: Config(32, 32, 4, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    "decode": {64: Config(16, 32, 4, 2), 128: Config(16, 32, 4, 2), 256: Config(16, 16, 4, 1)},
}
INTERPRETER = Config(16, 16, 1, 1)


def configuration(arch: str, kind: str, dtype: torch.dtype, head_dim: int, causal: bool) -> Config:
    """The configuration of a kernel on an architecture: from the user's file if it has one, else from the table.

    Args:
        arch: one of `ARCHITECTURES`, another sm or gfx number (see `nearest`), or "interpreter".
        kind: one of `KINDS`.
        dtype: bfloat16, float16 or float32.
        head_dim: the larger of D and Dv, up to 256.
        causal: whether rows have an upper bound. A tuned file distinguishes the two cases, the table does not.
    """
    if arch == "interpreter":
        return INTERPRETER
    bucket = next(size for size in HEAD_DIMS if head_dim <= size)
    tuned = _user_rows(os.environ.get("HF_ATTN_PLUGINS_TUNING", "")).get(key(arch, kind, dtype, bucket, causal))
    if tuned is not None:
        return tuned
    row = (SINGLE if dtype == torch.float32 else HALF)[kind][bucket]
    return row if isinstance(row, Config) else row[nearest(arch)]


def nearest(arch: str) -> str:
    """The architecture of the table that serves for `arch`: for NVIDIA the newest one that is not newer than `arch`."""
    if arch.startswith("gfx"):
        return "gfx942"
    number = int(arch.removeprefix("sm"))
    if number in SMALL or number >= 110:  # consumer Blackwell is sm_120
        return "sm86"
    return next(name for name in ("sm100", "sm90", "sm80") if number >= int(name[2:]) or name == "sm80")


def key(arch: str, kind: str, dtype: torch.dtype, head_dim: int, causal: bool) -> str:
    """The name of a row in a tuned file, such as "sm90/dq/bfloat16/128/causal"."""
    return f"{arch}/{kind}/{str(dtype).removeprefix('torch.')}/{head_dim}/{'causal' if causal else 'full'}"


def candidates(kind: str, head_dim: int) -> Iterator[Config]:
    """The configurations that tuning times; a candidate that does not fit the chip fails there and drops out."""
    rows = (16,) if kind == "decode" else (64, 128)
    for block_m in rows:
        for block_n in (32, 64, 128):
            for num_warps in (4, 8):
                for num_stages in (1, 2, 3):
                    if (block_m + 2 * block_n * num_stages) * head_dim * 2 <= 227 * 1024:
                        yield Config(block_m, block_n, num_warps, num_stages)
                        if kind == "forward" and block_m == 128 and num_stages > 1:
                            yield Config(block_m, block_n, num_warps, num_stages, tma=True)


@functools.cache
def _user_rows(path: str) -> dict[str, Config]:
    if not path:
        return {}
    with open(path, encoding="utf-8") as file:
        return {name: Config(*row) for name, row in json.load(file)["configurations"].items()}
