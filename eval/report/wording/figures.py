"""Numbers as a reader meets them: the same text in the terminal, in report.md and in report.html."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
NOTHING, SPACE = "\N{EN DASH}", "\N{NO-BREAK SPACE}"


def percent(share: float | None) -> str:
    """0.875 -> 87.5; "–" for None, as everywhere here."""
    return NOTHING if share is None else f"{100 * share:.1f}"


def points(share: float | None) -> str:
    """A difference of shares in points, with its sign: -0.125 -> −12.5. No difference at all is 0, without decimals."""
    if share is None:
        return NOTHING
    return "0" if share == 0 else f"{100 * share:+.1f}".replace("-", MINUS)


def difference(row: Mapping[str, Any]) -> str:
    """The paired difference of a row with its interval: −12.5 [−20.0, −5.0]; below ten pairs, how many differ."""
    if few(row, "pairs") and row.get("difference") is not None:
        return changed(row)
    text = points(row.get("difference"))
    if row.get("difference_low") is None or row.get("difference") is None:
        return text
    return f"{text} [{points(row['difference_low'])},{SPACE}{points(row['difference_high'])}]"


FEW = 10  # samples below which scores are counts


def few(row: Mapping[str, Any], count: str = "n") -> bool:
    """Whether a row has too few samples (or pairs) for a percentage to mean something."""
    return 0 < (row.get(count) or 0) < FEW


def interval(row: Mapping[str, Any], low: str = "low", high: str = "high", count: str = "n") -> Any:
    """(low, high) of a row's interval; (None, None) where it has none, or rests on too few samples to be shown."""
    return (None, None) if few(row, count) else (row.get(low), row.get(high))


def changed(row: Mapping[str, Any]) -> str:
    """How many of few answers have another score than the baseline's: 1 of 8 answers differs."""
    number, pairs = row.get("changed"), row["pairs"]
    if number is None:  # written before answers were counted
        return f"{points(row.get('difference'))} ({pairs} pairs)"
    return f"{number} of {pairs} answers differ{'s' if number == 1 else ''}" if number else f"0 of {pairs} differ"


def score(row: Mapping[str, Any], name: str = "mean") -> str:
    """Mean and standard error in per cent: 87.5 ± 3.3; below ten samples the sum of their scores: 7 of 8."""
    if few(row) and row.get(name) is not None:
        total = row.get("total")
        return f"{round(row[name] * row['n'] if total is None else total, 2):g} of {row['n']}"
    error = row.get("se" if name == "mean" else f"{name}_se")
    return percent(row.get(name)) + ("" if error is None else f" ± {100 * error:.1f}")


def ratio(value: float | None) -> str:
    """2.0734 -> 2.07×."""
    return NOTHING if value is None else f"{value:.2f}{TIMES}" if value < 100 else f"{value:.0f}{TIMES}"


def fine_ratio(value: float | None) -> str:
    """A ratio near 1, such as that of two perplexities: 1.0014."""
    return NOTHING if value is None else f"{value:.4f}" if value < 100 else f"{value:.0f}"


def change(ratio: float) -> str:
    """A ratio as a change in per cent: 1.17 -> +17 %, 0.985 -> −1.5 %."""
    percent = 100 * (ratio - 1)
    digits = 0 if abs(percent) >= 9.95 else 1
    return f"{percent:+.{digits}f} %".replace("-", MINUS)


def within_noise(row: Mapping[str, Any], name: str = "speed_up") -> bool:
    """Whether the rounds of a speed-up do not tell which is faster: they lie on both sides of 1.

    Of a single round, and where an earlier version kept no rounds, differences below five per cent say nothing.
    """
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if low is None or high is None or low == high:
        return bool(abs(row[name] - 1) < 0.05)
    return bool(low <= 1 <= high)


def speed(row: Mapping[str, Any], name: str = "speed_up") -> str:
    """A speed-up with its smallest and largest round: 1.43× (1.35 – 1.52)."""
    low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
    if row.get(name) is None or low is None or high is None or low == high:
        return ratio(row.get(name))
    return f"{ratio(row[name])} ({low:.2f}{SPACE}{NOTHING}{SPACE}{high:.2f})"


def perplexity(value: float | None) -> str:
    """Four significant digits."""
    return NOTHING if value is None else f"{value:.4g}"


def nats(value: float | None) -> str:
    """A divergence: 0.123, 1.9e−3, 0."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    if abs(value) >= 0.01:
        return f"{value:.3f}".replace("-", MINUS)
    digits, exponent = f"{value:.1e}".split("e")
    return f"{digits}e{int(exponent)}".replace("-", MINUS)


def answer_difference(row: Mapping[str, Any]) -> str:
    """By how many nats per token the reference answers are less likely than under the baseline: +0.012 [...]."""
    value = row.get("answer_difference")
    if value is None:
        return NOTHING
    low, high = row.get("answer_difference_low"), row.get("answer_difference_high")
    interval = (
        "" if low is None or high is None or few(row, "answer_pairs") else f" [{_signed(low)},{SPACE}{_signed(high)}]"
    )
    return _signed(value) + interval


def _signed(value: float) -> str:
    text = nats(value)
    return f"+{text}" if value > 0 else text


def seconds(value: float | None) -> str:
    """3.21 s, 45.1 ms."""
    if value is None:
        return NOTHING
    return f"{value:.3g} s" if value >= 1 else f"{1000 * value:.3g} ms"


def size(count: float | None) -> str:
    """Bytes in the unit that fits: 512 MiB, 1.5 GiB."""
    if count is None:
        return NOTHING
    for unit, bytes_ in (("GiB", 2**30), ("MiB", 2**20)):
        if abs(count) >= bytes_:
            return f"{count / bytes_:.3g} {unit}" if abs(count) < 100 * bytes_ else f"{count / bytes_:.0f} {unit}"
    return f"{count / 2**10:.0f} KiB"


def memory(row: Mapping[str, Any]) -> str:
    """Peak memory and its ratio to the baseline's: 512 MiB (0.83×)."""
    share = row.get("memory_ratio")
    return size(row.get("peak_bytes")) + ("" if share is None else f" ({ratio(share)})")


def count(number: int, noun: str) -> str:
    """1 sample, 2,000 samples."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
