"""Which GPU a launch goes to, and launching: for real, or recorded for the ahead-of-time check."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Launch(NamedTuple):
    """One launch as it was asked for: what the ahead-of-time check compiles."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


# Global state, set by `recording` only: (architecture, launches recorded so far), None when launches run.
_recording: tuple[str, list[Launch]] | None = None


@contextlib.contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Collect launches on meta tensors, as if they were on a GPU of architecture `arch`, instead of running them."""
    global _recording
    _recording = (arch, [])
    try:
        yield _recording[1]
    finally:
        _recording = None


def launch(kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
    """kernel[grid](...) with every argument by its name, unless launches are being recorded."""
    if _recording is not None:
        _recording[1].append(Launch(kernel, grid, arguments))
    else:
        kernel[grid](**arguments)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device, which is not the tensor's when a model is spread over several."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def architecture(device: torch.device) -> str:
    """ "sm90", "gfx942", ...; "interpreter" for CPU tensors."""
    if _recording is not None:
        return _recording[0]
    return "interpreter" if device.type == "cpu" else _architecture(device)


@functools.cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm{major}{minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4  # the interpreter has none; this many make it split
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision(dtype: torch.dtype, arch: str) -> str:
    """How products of float32 tiles are done: three TF32 products on NVIDIA, plain float32 elsewhere."""
    return "tf32x3" if dtype == torch.float32 and arch.startswith("sm") else "ieee"


def takes_tma(*tensors: Tensor) -> bool:
    """Whether TMA descriptors can be made of (B, H, S, D) tensors: Hopper or newer, and steps of 16 bytes.

    Descriptors made in a kernel need memory from a hook of Triton, which is set here.
    """
    arch = architecture(tensors[0].device)
    if not (arch == "interpreter" or (arch.startswith("sm") and int(arch[2:]) >= 90)):
        return False
    for tensor in tensors:
        size = tensor.element_size()
        steps = (*tensor.stride()[:3], tensor.shape[3])
        place = 0 if tensor.device.type == "meta" else tensor.data_ptr()
        if tensor.stride(3) != 1 or tensor.stride(2) < 1 or place % 16 or any(step * size % 16 for step in steps):
            return False
    if arch != "interpreter" and _recording is None:
        import triton

        triton.set_allocator(_scratch)  # again in every call: Triton keeps it per thread
    return True


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
