"""Peak memory of a `with` block: on GPUs from PyTorch's allocator, on Linux CPUs from the kernel's high-water mark."""

from __future__ import annotations

import ctypes
import gc
from types import TracebackType

import torch


class PeakMemory:
    """Context manager that measures memory of `device`.

    After the block, `bytes` is the peak minus what was in use at the start; None if the system does not report it.
    """

    bytes: int | None = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.start: int | None = torch.cuda.memory_allocated(self.device)
        else:
            self.start = _status("VmRSS") if _reset_high_water_mark() else None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak: int | None = torch.cuda.max_memory_allocated(self.device)
        else:
            peak = _status("VmHWM")
        if self.start is not None and peak is not None:
            self.bytes = max(0, peak - self.start)


def _reset_high_water_mark() -> bool:
    try:
        # malloc keeps freed memory and hands it out again: the peak would be too small. So it is given back first.
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        return False
    try:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int | None:
    try:
        with open("/proc/self/status", encoding="ascii") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(field + ":")), None)
    except OSError:
        return None
