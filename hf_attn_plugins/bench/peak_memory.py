"""Peak memory of a stretch of code, on GPUs by the allocator and on Linux CPUs by the kernel's high-water mark."""

from __future__ import annotations

import ctypes
import gc
from types import TracebackType

import torch


class PeakMemory:
    """Context manager; afterwards `bytes` is the peak above the start, or None where the system cannot tell."""

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
        # Memory that malloc kept from earlier work would hide what this work needs.
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
