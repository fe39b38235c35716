"""What this computer's CPU means for the choice of a dtype and a plugin, as one sentence; nothing heavy is imported."""

from __future__ import annotations

import platform
from collections.abc import Set

from hf_attn_plugins.core.cpu import ARM, X86, fields

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
    return sentence(platform.machine(), set(fields().get("flags", "").split()))
