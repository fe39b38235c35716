"""The numbers of a chart's axes: where the ticks are, what they say, and where a value lies between the ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

NICE = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True)
class Axis:
    """An axis from `low` to `high`; `place` maps a value to 0.0 - 1.0, values beyond the ends to the ends."""

    name: str
    low: float
    high: float
    ticks: tuple[tuple[float, str], ...]
    logarithmic: bool = False

    def place(self, value: float) -> float:
        """0.0 at `low`, 1.0 at `high`."""
        value = min(max(value, self.low), self.high)
        if self.logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def linear(name: str, values: Iterable[float], text: Callable[[float], str], *, include: Iterable[float] = ()) -> Axis:
    """An axis of round ticks (four to seven of them) around the values, `include` among them."""
    known = [*values, *include]
    low, high = min(known), max(known)
    if low == high:
        low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
    step = round_step((high - low) / 4)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple((index * step, text(index * step)) for index in range(first, last + 1))
    return Axis(name, first * step, last * step, ticks)


def decades(name: str, values: Iterable[float], *, floor: float) -> Axis:
    """A logarithmic axis of whole decades; values below `floor` (zeros, rounding noise) lie on it."""
    known = [max(value, floor) for value in values]
    first = math.floor(math.log10(min(known)) + 1e-9)
    last = max(math.ceil(math.log10(max(known)) - 1e-9), first + 1)
    every = max(1, math.ceil((last - first) / 5))
    lowest = min(known) <= floor
    ticks = tuple(
        (10.0**power, ("≤ " if lowest and power == first else "") + _power(power))
        for power in range(first, last + 1)
        if (power - first) % every == 0
    )
    return Axis(name, 10.0**first, 10.0**last, ticks, logarithmic=True)


def steps(name: str, texts: Iterable[str]) -> Axis:
    """An axis of equal steps at 0, 1, 2, ... with half a step of room at both ends."""
    ticks = tuple((float(index), text) for index, text in enumerate(texts))
    return Axis(name, -0.5, len(ticks) - 0.5, ticks)


def positions(name: str, end: int) -> Axis:
    """An axis of token positions from 0 to `end`, in quarters (511 predictions of 512 tokens: to 512)."""
    end = -(-end // 4) * 4
    return Axis(name, 0.0, float(end), tuple((end * part / 4, short(end * part // 4)) for part in range(5)))


def round_step(rough: float) -> float:
    """The smallest of 1, 2, 2.5, 5, 10 times a power of ten that is at least `rough`."""
    power = 10.0 ** math.floor(math.log10(max(rough, 1e-300)))
    return next(nice * power for nice in NICE if nice * power >= rough * (1 - 1e-9))


def short(value: float) -> str:
    """Token counts: 512, 1k, 1.5k, 32k (k = 1024 where that is exact, else 1000)."""
    for unit in (1024, 1000):
        if value >= unit and value % (unit / 2) == 0:
            return f"{value / unit:g}k"
    return f"{value:g}"


def _power(power: int) -> str:
    return (
        f"{10.0**power:g}"
        if -3 <= power <= 3
        else "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    )
