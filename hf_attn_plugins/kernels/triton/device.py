"""Launches of the Triton kernels: run on the tensors' GPU, or recorded for ahead-of-time compilation."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_attn_plugins.core.gpu import arch_of


class Launch(NamedTuple):
    """One recorded launch, which `static.py` compiles.

    Attributes:
        kernel: the jitted function.
        grid: numbers of programs.
        arguments: every argument by name, with num_warps and num_stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]


# Global state, set by `recording` only: (architecture, launches recorded so far). None: launches run.
_recording: tuple[str, list[Launch]] | None = None


@contextlib.contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """In the block, launches on meta tensors are collected as for a GPU of architecture `arch`; none is run."""
    global _recording
    _recording = (arch, [])
    try:
        yield _recording[1]
    finally:
        _recording = None


def launch(kernel: Any, grid: tuple[int, ...], /, **arguments: Any) -> None:
    """Run kernel[grid](**arguments), or record it inside of `recording`."""
    if _recording is not None:
        _recording[1].append(Launch(kernel, grid, arguments))
    else:
        kernel[grid](**arguments)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Make the tensor's device current: Triton launches on the current one, and a model may use several."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def architecture(device: torch.device) -> str:
    """The name of a GPU's architecture, such as "sm90" or "gfx942"; "interpreter" for the CPU."""
    if _recording is not None:
        return _recording[0]
    return "interpreter" if device.type == "cpu" else arch_of(device)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The number of multiprocessors of a GPU."""
    if device.type != "cuda":
        return 4  # the interpreter has none; with 4 it splits keys, too
    return torch.cuda.get_device_properties(device).multi_processor_count


def precision(dtype: torch.dtype, arch: str) -> str:
    """Triton's `input_precision` of products: three TF32 products for float32 on NVIDIA, else plain ("ieee")."""
    return "tf32x3" if dtype == torch.float32 and arch.startswith("sm") else "ieee"


def takes_tma(*tensors: Tensor) -> bool:
    """Whether TMA descriptors can be made of (B, H, S, D) tensors: on Hopper or newer, with strides of 16 bytes.

    Descriptors made in a kernel need scratch memory. If True, Triton's hook for it is set here.
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

        triton.set_allocator(_scratch)  # in every call, because Triton keeps the hook per thread
    return True


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")
