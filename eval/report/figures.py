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
    """The paired difference of a row with its interval: −12.5 [−20.0, −5.0]."""
    text = points(row.get("difference"))
    if row.get("difference_low") is None or row.get("difference") is None:
        return text
    return f"{text} [{points(row['difference_low'])},{SPACE}{points(row['difference_high'])}]"


def score(row: Mapping[str, Any], name: str = "mean") -> str:
    """Mean and standard error in per cent: 87.5 ± 3.3."""
    error = row.get("se" if name == "mean" else f"{name}_se")
    return percent(row.get(name)) + ("" if error is None else f" ± {100 * error:.1f}")


def ratio(value: float | None) -> str:
    """2.0734 -> 2.07×."""
    return NOTHING if value is None else f"{value:.2f}{TIMES}" if value < 100 else f"{value:.0f}{TIMES}"


def fine_ratio(value: float | None) -> str:
    """A ratio near 1, such as that of two perplexities: 1.0014."""
    return NOTHING if value is None else f"{value:.4f}" if value < 100 else f"{value:.0f}"


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
