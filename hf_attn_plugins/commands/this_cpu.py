"""What this computer's CPU means for the choice of a dtype and a plugin, as one sentence; nothing heavy is imported."""

from __future__ import annotations

import platform
from collections.abc import Set
from pathlib import Path

X86, ARM = ("x86_64", "amd64"), ("aarch64", "arm64")
# By a word of the flags, the best first: what it is called, and whether it multiplies bfloat16.
FEATURES = (
    ("amx_tile", "AMX", True),
    ("avx512_bf16", "AVX512-BF16", True),
    ("avx512f", "AVX-512", False),
    ("avx2", "AVX2", False),
)


def sentence(machine: str, flags: Set[str]) -> str:
    """Which row of the README's table this CPU is; "" where that is not known.

    Args:
        machine: `platform.machine()`.
        flags: words of /proc/cpuinfo, as `lscpu` prints them; empty where the system has no such file.
    """
    if machine.lower() in ARM:
        return "This CPU is an Arm: no speed is measured there. `hf-attn compare MODEL` measures it."
    if machine.lower() not in X86 or not flags:
        return ""
    for flag, title, multiplies in FEATURES:
        if flag in flags:
            what = f"multiplies bfloat16 ({title})" if multiplies else f"has {title} and does not multiply bfloat16"
            dtype = "bfloat16" if multiplies else "float32"
            return f"This CPU {what}: load models in {dtype} and use tiled_attention."
    return "This CPU has neither AVX2 nor AVX-512: load models in float32; no plugin is faster than sdpa there."


def here() -> str:
    """`sentence` for the CPU that this process runs on."""
    return sentence(platform.machine(), flags_of(Path("/proc/cpuinfo")))


def flags_of(path: Path) -> frozenset[str]:
    """The words of the first "flags" line of Linux's list of CPUs; none where it cannot be read."""
    try:
        with path.open(encoding="utf-8", errors="ignore") as file:
            line = next((line for line in file if line.startswith("flags")), "")
    except OSError:
        line = ""
    return frozenset(line.partition(":")[2].split())
