"""Which samples a run asks, in which order, and by which process: decided before anything runs, from counts alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple


class Unit(NamedTuple):
    """One sample, asked of every attention implementation in turn."""

    task: int
    length: int
    number: int


def units(
    tasks: int, lengths: Sequence[int], samples: Callable[[int, int], int], process: int = 0, processes: int = 1
) -> list[Unit]:
    """The units of one process: short ones first, dealt round by round, so that processes finish together.

    A unit's process depends on nothing that has been done already: a resumed run deals as the first one did.

    Args:
        samples: (task, length) -> number of samples.
    """
    every = [
        Unit(task, length, index)
        for length in sorted(lengths)
        for task in range(tasks)
        for index in range(samples(task, length))
    ]
    return every[process::processes]
