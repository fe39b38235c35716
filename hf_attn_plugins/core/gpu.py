"""Facts about a GPU that decide which kernel runs, asked once per device; constants while torch.compile traces."""

from __future__ import annotations

import functools

import torch


@torch.compiler.assume_constant_result
def arch_of(device: torch.device) -> str:
    """The architecture of a CUDA or ROCm device, such as "sm90" or "gfx942"."""
    return _arch(device)


@torch.compiler.assume_constant_result
def name_of(device: torch.device) -> str:
    """The name of a CUDA or ROCm device, such as "NVIDIA H100 80GB HBM3"; of other devices their type, "mps"."""
    return _name(device)


@functools.cache
def _arch(device: torch.device) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def generation(arch: str) -> int:
    """The number of an NVIDIA architecture, 90 for "sm90"; 0 for those of AMD."""
    return int(arch[2:]) if arch.startswith("sm") else 0
