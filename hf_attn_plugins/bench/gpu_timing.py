"""Timing on a GPU: medians of device events, with a cold second-level cache; alternatives and inputs take turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

FLUSH_BYTES = 256 * 2**20  # larger than the second-level cache of any GPU so far


class Clock:
    """Milliseconds of device work, by events. On a CPU, which only the tests use, milliseconds of wall time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cold = torch.empty(FLUSH_BYTES if device.type == "cuda" else 1, dtype=torch.int8, device=device)

    def time(self, run: Callable[[], Any]) -> Callable[[], float]:
        """Run once with a cold cache. Call the returned function after `wait` to read the milliseconds."""
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
        """Wait until the device has finished all work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def medians_ms(
    alternatives: Mapping[str, Callable[..., Any]], inputs: Sequence[Any], device: torch.device, repeats: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Median milliseconds of each alternative, and the error of each alternative that cannot run.

    Each alternative has three warm-up calls, in which it may compile. Then every alternative runs once per round; round
    i uses `inputs[i % len(inputs)]`.

    Args:
        alternatives: name -> function that takes one entry of `inputs` as its arguments.
        inputs: argument lists.
        device: where the work runs.
        repeats: number of rounds.

    Returns:
        name -> milliseconds, and name -> error text.
    """
    clock = Clock(device)
    failed: dict[str, str] = {}
    for name, run in alternatives.items():
        try:
            for index in range(3):
                run(*inputs[index % len(inputs)])
            clock.wait()
        except Exception as error:  # a backend may refuse a shape: the table then says so
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
    """TFLOP/s of a (size, size) bfloat16 matrix product: the "peak" of the tables.

    Raises:
        RuntimeError: the device cannot compute the product.
    """
    pair = [torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2)]
    milliseconds, failed = medians_ms({"matmul": torch.matmul}, [pair], device, repeats)
    if failed:
        raise RuntimeError(f"no matrix product on {device}: {failed['matmul']}")
    return 2 * size**3 / milliseconds["matmul"] / 1e9
