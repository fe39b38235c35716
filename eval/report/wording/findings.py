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
        parts = [_agreement(row), _likelihood(row), _answers(row), _score(row), _speed(row), _errors(row)]
        parts = [part for part in parts if part]
        if row["attn"] not in baselines and parts:
            *others, last = parts
            found.append((row["attn"], (f"{', '.join(others)} and {last}" if others else last) + "."))
    return found


# Nats per position: twice what rounding to bfloat16 makes; where answers rarely change; where they visibly do.
SAME, CLOSE, FAR = 0.004, 0.01, 0.1


def _agreement(row: Row) -> str:
    """The verdict, from all positions of a text: it comes before any score."""
    kl, top1 = row.get("kl"), row.get("top1")
    if kl is None:
        return ""
    verdict = "predicts what the baseline predicts" if kl < SAME else "predicts nearly what the baseline predicts"
    if kl >= FAR:
        verdict = "predicts otherwise than the baseline"
    same = "" if top1 is None else f", the same first choice at {figures.percent(top1)} % of positions"
    return f"{verdict} (KL {figures.nats(kl)} nats{same})"


def _answers(row: Row) -> str:
    """How likely the reference answers are, compared with the baseline."""
    value, count = row.get("answer_difference"), row.get("answer_pairs", 0)
    if value is None:
        return ""
    of = figures.count(count, "reference answer")
    low, high = figures.interval(row, "answer_difference_low", "answer_difference_high", "answer_pairs")
    if abs(value) < 5e-4:
        return f"finds the reference answers as likely ({of})"
    side = "less" if value > 0 else "more"
    chance = ", which chance can explain" if low is not None and high is not None and low <= 0 <= high else ""
    return f"finds the reference answers {side} likely by {figures.nats(abs(value))} nats a token ({of}{chance})"


def _score(row: Row) -> str:
    gap, pairs = row["difference"], figures.count(row["pairs"], "pair")
    if gap is None:
        return ""
    if figures.few(row, "pairs"):
        number = row.get("changed")
        if number is None:  # written before answers were counted
            return "" if gap else f"scores exactly what the baseline scores (difference 0, {pairs})"
        if not number:
            return f"scores what the baseline scores (0 of {row['pairs']} answers differ)"
        differ = f"{number} of {row['pairs']} answers score{'s' if number == 1 else ''} otherwise"
        return f"has other scores in few answers ({differ}, too few to rank)"
    low, high = row["difference_low"], row["difference_high"]
    if gap == 0 and low in (None, 0) and high in (None, 0):
        return f"scores exactly what the baseline scores (difference 0, {pairs})"
    side = "above" if gap > 0 else "below"
    amount = f"scores {abs(100 * gap):.1f} points {side} the baseline" if gap else "scores as high as the baseline"
    if low is None:
        return f"{amount} ({pairs})"
    interval = f"95 % interval {figures.points(low)} to {figures.points(high)}, {pairs}"
    if low <= 0 <= high:
        return (
            f"scores as the baseline does as far as chance allows to say (difference {figures.points(gap)}, {interval})"
        )
    return f"{amount} ({interval})"


def _speed(row: Row) -> str:
    if row.get("speed_up") is None:
        return ""
    up, at = row["speed_up"], f"{row['speed_length']:,} tokens"
    if figures.within_noise(row):
        return f"prefills {at} as fast, within noise"
    times = figures.ratio(max(up, 1 / up))
    return f"prefills {at} {times} {'faster' if up > 1 else 'slower'}{_rounds(row, up)}"


def _rounds(row: Row, up: float) -> str:
    low, high = row.get("speed_up_low"), row.get("speed_up_high")
    if low is None or high is None or low == high:
        return ""
    ends = (low, high) if up > 1 else (1 / high, 1 / low)
    return f" (rounds from {ends[0]:.2f} to {ends[1]:.2f})"


def _likelihood(row: Row) -> str:
    if row["perplexity_ratio"] is not None and abs(row["perplexity_ratio"] - 1) < 5e-5:
        return ""
    if row["perplexity_ratio"] is not None:
        return f"has {figures.fine_ratio(row['perplexity_ratio'])} times its perplexity"
    return "" if row["kl"] is None else f"is {figures.nats(row['kl'])} nats away from its predictions"


def _errors(row: Row) -> str:
    return f"failed in {figures.count(row['errors'], 'sample')}" if row["errors"] else ""
