"""What a run found, in one sentence for each attention: for those who read nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from . import figures

Row = Mapping[str, Any]


def sentences(metrics: Row) -> list[tuple[str, str]]:
    """(attention, sentence) for every attention but the baseline; the sentence continues its name."""
    baselines = metrics.get("baselines", [metrics["baseline"]])
    found = []
    for row in metrics["overall"]:
        parts = [part for part in (_score(row), _speed(row), _likelihood(row), _errors(row)) if part]
        if row["attn"] not in baselines and parts:
            *others, last = parts
            found.append((row["attn"], (f"{', '.join(others)} and {last}" if others else last) + "."))
    return found


def _score(row: Row) -> str:
    gap, pairs = row["difference"], figures.count(row["pairs"], "pair")
    if gap is None:
        return ""
    low, high = row["difference_low"], row["difference_high"]
    if gap == 0 and low in (None, 0) and high in (None, 0):
        return f"scores exactly what the baseline scores (difference 0, {pairs})"
    side = "above" if gap > 0 else "below"
    amount = f"scores {abs(100 * gap):.1f} points {side} the baseline" if gap else "scores as high as the baseline"
    if low is None:
        return f"{amount} ({pairs})"
    chance = ", which chance can explain" if low <= 0 <= high else ""
    return f"{amount} (95 % interval {figures.points(low)} to {figures.points(high)}, {pairs}{chance})"


def _speed(row: Row) -> str:
    if row.get("speed_up") is None:
        return ""
    return f"prefills {row['speed_length']:,} tokens {figures.ratio(row['speed_up'])} as fast"


def _likelihood(row: Row) -> str:
    if row["perplexity_ratio"] is not None and abs(row["perplexity_ratio"] - 1) < 5e-5:
        return ""
    if row["perplexity_ratio"] is not None:
        return f"has {figures.fine_ratio(row['perplexity_ratio'])} times its perplexity"
    return "" if row["kl"] is None else f"is {figures.nats(row['kl'])} nats away from its predictions"


def _errors(row: Row) -> str:
    return f"failed in {figures.count(row['errors'], 'sample')}" if row["errors"] else ""
