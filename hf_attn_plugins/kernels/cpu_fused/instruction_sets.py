"""Which instruction set the compiled kernels use: a table, and the choice by the CPU and the dtype."""

from __future__ import annotations

import functools
import os
import platform
import sys
from typing import NamedTuple

import torch

from hf_attn_plugins.core.compat import cpu_has
from hf_attn_plugins.core.cpu import ARM, X86

VARIABLE = "HF_ATTN_PLUGINS_INSTRUCTIONS"  # the best set that may be used; sets above it in the table are not


class InstructionSet(NamedTuple):
    """One way to compile the sources.

    Attributes:
        name: as in `SETS`.
        machine: `platform.machine()` names it runs on, in lower case.
        feature: what `core.compat.cpu_has` is asked; "" where every such machine has it.
        title: what a user knows it by.
        folder: the sources, in a folder beside this file.
        flags: what the compiler is told.
        dtypes: how tensors may be stored.
        lanes: held rows of a block, LANES of tile.h.
        split_keys: keys of a chunk of decoding, SPLIT_KEYS of decode.c.
        walked: STEP and TILE of sources that keep walked rows in pairs (`Call.pairs`); None where they do not.
        pairs_first: whether a forward of many rows makes pairs of all values first, a copy of the values. With AMX that
            saves a fifth of the time; with AVX512-BF16 it saves none, and every block of queries makes its own.
    """

    name: str
    machine: tuple[str, ...]
    feature: str
    title: str
    folder: str
    flags: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    lanes: int
    split_keys: int
    walked: tuple[int, int] | None = None
    pairs_first: bool = False


AVX2 = ("-mavx2", "-mfma", "-mf16c")  # every CPU with AVX2 has the other two
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
AVX512_BF16 = (*AVX512, "-mavx512bf16")
STORED = (torch.float32, torch.bfloat16, torch.float16)  # in the order of vec.h
# The first that the CPU has is used. Sources in `float32` multiply in float32, whatever the tensors are stored in.
SETS = (
    InstructionSet("amx", X86, "amx_tile", "AMX", "bfloat16", (*AVX512_BF16, "-mamx-tile", "-mamx-bf16"),
                   (torch.bfloat16,), 64, 512, (32, 128), True),
    InstructionSet("avx512_bf16", X86, "avx512_bf16", "AVX512-BF16", "bfloat16", AVX512_BF16,
                   (torch.bfloat16,), 64, 512, (6, 96)),
    InstructionSet("avx512", X86, "avx512", "AVX-512", "float32", AVX512, STORED, 96, 576),
    InstructionSet("avx2", X86, "avx2", "AVX2", "float32", AVX2, STORED, 96, 576),
    InstructionSet("neon", ARM, "", "Arm NEON", "float32", (), STORED, 96, 576),
)  # fmt: skip


@functools.cache
def cpu_has_kept(feature: str) -> bool:
    """`cpu_has`, asked once in a process: for questions of every call."""
    return cpu_has(feature)


@functools.cache
def best(dtype: torch.dtype, most: str | None = None) -> InstructionSet | str:
    """The set that kernels for `dtype` use on this CPU, or the reason why there is none.

    Args:
        most: the best set that may be used, None for any; see `allowed`.

    Raises:
        ValueError: no set is called `most`.
    """
    names = [one.name for one in SETS]
    if most is not None and most not in names:
        raise ValueError(f"{VARIABLE}={most!r} is unknown: choose one of {', '.join(names)}, or unset it.")
    fitting = [one for one in SETS[names.index(most) if most else 0 :] if dtype in one.dtypes]
    here = platform.machine().lower()
    for one in fitting:
        if one.name == "amx" and sys.platform == "win32":
            continue  # GCC's own header of AMX takes strides as `long`, 32 bits there, and does not assemble
        if here in one.machine and (not one.feature or cpu_has(one.feature)):
            return one
    wanted = ", ".join(one.title for one in fitting)
    return f"this CPU has none of the instruction sets {wanted}" if fitting else f"they are not made for {dtype}"


@functools.cache
def allowed() -> str | None:
    """The best set that the environment allows, None for any; read once (`allowed.cache_clear()` reads it again)."""
    return os.environ.get(VARIABLE) or None
