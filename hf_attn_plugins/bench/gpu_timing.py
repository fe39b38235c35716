"""Timing on a GPU: device events, cold second-level cache, rotating inputs, alternatives interleaved, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20  # more than any second-level cache of today


class Clock:
    """Milliseconds of device work between two points; of wall time on a CPU, where only the tests use it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cold = torch.empty(FLUSH_BYTES if device.type == "cuda" else 1, dtype=torch.int8, device=device)

    def time(self, run: Callable[[], Any]) -> Callable[[], float]:
        """Run once on a cold cache; the result tells the milliseconds once the device has been waited for."""
        self.cold.zero_()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            run()
            passed = (time.perf_counter() - begin) * 1e3
            return lambda: passed
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        return lambda: start.elapsed_time(end)

    def wait(self) -> None:
        """Until the device has done everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def medians_ms(
    alternatives: Mapping[str, Callable[..., Any]], inputs: Sequence[Any], device: torch.device, repeats: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Median milliseconds of each alternative, called with the inputs in turn; and why the others could not run.

    Three warm-up calls each (compilation included), then `repeats` rounds in which every alternative runs once.
    """
    clock = Clock(device)
    failed: dict[str, str] = {}
    for name, run in alternatives.items():
        try:
            for index in range(3):
                run(*inputs[index % len(inputs)])
            clock.wait()
        except Exception as error:  # a back end that refuses a shape is a result of the benchmark
            failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:160]
    results: dict[str, list[Callable[[], float]]] = {name: [] for name in alternatives if name not in failed}
    for index in range(repeats):
        given = inputs[index % len(inputs)]
        for name in results:
            run = alternatives[name]
            results[name].append(clock.time(lambda run=run, given=given: run(*given)))  # type: ignore[misc]
    clock.wait()
    return {name: statistics.median(read() for read in reads) for name, reads in results.items()}, failed


def matrix_peak(device: torch.device, size: int = 8192, repeats: int = 20) -> float:
    """TFLOP/s of a bfloat16 matrix product of this size: what "peak" means in the tables."""
    pair = [torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2)]
    found, failed = medians_ms({"matmul": torch.matmul}, [pair], device, repeats)
    if failed:
        raise RuntimeError(f"no matrix product on {device}: {failed['matmul']}")
    return 2 * size**3 / found["matmul"] / 1e9
