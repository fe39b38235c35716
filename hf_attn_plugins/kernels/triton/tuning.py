"""Tile sizes, warps and pipeline stages of the Triton kernels: a committed table, so that no first call waits.

The table's rows were chosen by what the compiler makes of them (no spilled registers, shared memory within the chip's
limit: benchmarks/results/triton_static.md), not by timings. `hf-attn bench gpu --tune FILE` times the candidates on the
machine it runs on and writes FILE; HF_ATTN_PLUGINS_TUNING=FILE makes its rows take precedence.

TMA descriptors in the forward compile for sm_90 and sm_100 (`hf-attn bench triton --static` lists both ways): the same
matrix instructions, in bfloat16 33 to 57 registers a thread fewer on sm_90 and 3 to 45 on sm_100, no spills up to
head_dim 128 (8 bytes of stack at 256, full, on sm_100). That is no timing, and up to head_dim 128 as many blocks fit on
a multiprocessor either way, so the rows below load by pointers until a GPU has shown what is faster; tuning tries both.

Warp specialisation (`tl.range(..., warp_specialize=True)`) is left out for what Triton 3.9 makes of it. sm_90, tried on
a bare forward loop: with 8 warps the same registers, memory and instructions as without; with 4 the compiler's
NVGPUWarpSpecialization pass fails. sm_100, tried on this forward: with TMA the TritonGPUHoistTMEMAlloc pass fails; with
pointers it compiles, to as many registers (246 for 245 at head_dim 64, 220 for 222 at 128) and a tenth more shared
memory.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

ARCHITECTURES = ("sm80", "sm90", "sm100", "gfx942")
KINDS = ("forward", "dq", "dkdv", "decode")
HEAD_DIMS = (64, 128, 256)


class Config(NamedTuple):
    """block_m rows by block_n keys, done by num_warps warps, loads num_stages tiles ahead.

    tma: the forward loads keys and values by TMA descriptors, where chip and strides allow it.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    tma: bool = False


def _split(sm80: Config, sm90: Config, sm100: Config, gfx942: Config) -> dict[str, Config]:
    return {"sm80": sm80, "sm90": sm90, "sm100": sm100, "gfx942": gfx942}


# kind -> head_dim -> one Config for every architecture, or one each.
HALF: dict[str, dict[int, Config | dict[str, Config]]] = {
    "forward": {
        64: _split(Config(128, 64, 4, 3), Config(128, 128, 8, 2), Config(128, 64, 4, 3), Config(128, 64, 4, 3)),
        128: _split(Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(128, 64, 8, 3), Config(128, 64, 4, 1)),
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
        256: _split(Config(32, 64, 8, 1), Config(32, 32, 8, 1), Config(32, 64, 8, 1), Config(16, 32, 4, 1)),
    },
    "decode": {64: Config(16, 64, 4, 3), 128: Config(16, 64, 4, 3), 256: Config(16, 32, 4, 2)},
}
SINGLE: dict[str, dict[int, Config | dict[str, Config]]] = {
    "forward": {64: Config(64, 32, 4, 2), 128: Config(64, 32, 8, 2), 256: Config(32, 16, 8, 1)},
    "dq": {64: Config(32, 32, 4, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    "dkdv": {64: Config(32, 32, 4, 1), 128: Config(32, 32, 8, 1), 256: Config(16, 16, 8, 1)},
    "decode": {64: Config(16, 32, 4, 2), 128: Config(16, 32, 4, 2), 256: Config(16, 16, 4, 1)},
}
INTERPRETER = Config(16, 16, 1, 1)


def configuration(arch: str, kind: str, dtype: torch.dtype, head_dim: int, causal: bool) -> Config:
    """The configuration of a kernel on an architecture: from the user's file if it has one, else from the table.

    Args:
        arch: one of `ARCHITECTURES`, another sm or gfx number (which takes the nearest row), or "interpreter".
        kind: one of `KINDS`.
        dtype: bfloat16, float16 or float32.
        head_dim: the larger of D and Dv, up to 256.
        causal: whether rows have an upper bound; the table has one row for both, tuned files have two.
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
    """The architecture of the table whose row an unknown one takes: the largest that is not newer."""
    if arch.startswith("gfx"):
        return "gfx942"
    number = int(arch.removeprefix("sm"))
    if number >= 110:  # consumer Blackwell has Ampere's shared memory
        return "sm80"
    return next(name for name in ("sm100", "sm90", "sm80") if number >= int(name[2:]) or name == "sm80")


def key(arch: str, kind: str, dtype: torch.dtype, head_dim: int, causal: bool) -> str:
    """A row's name in a tuned file."""
    return f"{arch}/{kind}/{str(dtype).removeprefix('torch.')}/{head_dim}/{'causal' if causal else 'full'}"


def candidates(kind: str, head_dim: int) -> Iterator[Config]:
    """The short list that tuning times; what spills or does not fit drops out by itself."""
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
