"""The first line of every attention: what a person should do, from predictions first, then answers, then speed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_attn_plugins.plugins import PLUGINS

from . import figures
from .findings import CLOSE, FAR, SAME

Row = Mapping[str, Any]
SAME_PERPLEXITY, NEAR_PERPLEXITY = 0.01, 0.05  # of the baseline's: as rounding and chance change it; visibly


@dataclass(frozen=True)
class Verdict:
    """What to do about one attention.

    Attributes:
        grade: "safe", "try" (small differences), "no" or "unknown" (nothing was compared).
        text: one sentence without the attention's name and without a full stop.
    """

    attn: str
    grade: str
    text: str


def verdicts(metrics: Row) -> list[Verdict]:
    """One for every attention but the baseline, in the order of the run."""
    baselines = metrics.get("baselines", [metrics["baseline"]])
    return [verdict(row, metrics) for row in metrics["overall"] if row["attn"] not in baselines]


def verdict(row: Row, metrics: Row) -> Verdict:
    """The verdict of one row of `overall`, at its worst length."""
    if _never_ran(row):
        return Verdict(row["attn"], "unknown", "ran as full attention at these lengths: nothing approximate was tested")
    worst, best = _by_length(row, metrics)
    grade = grade_of(worst)
    difference, score = _predictions(worst), ""
    if grade != "unknown" and _score_is_lower(row):
        grade = {"safe": "try", "try": "no"}.get(grade, grade)
        score = f"score {abs(100 * row['difference']):.1f} points lower"
    elif grade in ("try", "no"):
        score = _changed(row)
    faster, speed = _speed(row)
    parts = [part for part in (difference, score, speed) if part]
    if grade == "unknown":
        return Verdict(row["attn"], grade, ", ".join([*parts, "predictions were not compared"]))
    advice = {
        ("safe", True): f"safe to switch{_where(row, metrics)}",
        ("safe", None): f"safe to switch{_where(row, metrics)}",
        ("safe", False): "safe, but no gain here",
        ("try", True): "try it on your own task first",
        ("try", None): "try it on your own task first",
        ("try", False): "no reason to switch here",
    }.get((grade, faster), _not_here(row, metrics, best))
    return Verdict(row["attn"], grade, f"{', '.join(parts)}: {advice}")


def grade_of(row: Row) -> str:
    """The grade: "safe" where answers rarely change, "try": a little, "no": visibly, "unknown": no data."""
    kl, ratio = row.get("kl"), row.get("perplexity_ratio")
    if kl is None and ratio is None:
        return "unknown"
    more = 0.0 if ratio is None else abs(ratio - 1)
    if (kl is None or kl < CLOSE) and more < SAME_PERPLEXITY:
        return "safe"
    return "try" if (kl is None or kl < FAR) and more < NEAR_PERPLEXITY else "no"


def _by_length(row: Row, metrics: Row) -> tuple[Row, int | None]:
    """(KL and perplexity of the length where they are worst, the longest length where all is well or None)."""
    found: dict[int, dict[str, Any]] = {}
    for each in metrics.get("agreement", ()):
        if each["attn"] == row["attn"]:
            at = found.setdefault(each["length"], {})
            at["kl"] = max(at.get("kl") or 0.0, each["kl"]["mean"] or 0.0)
            at["perplexity_ratio"] = each["perplexity_ratio"]
    for each in metrics.get("loss", ()):
        if each["attn"] == row["attn"] and each["ratio"] is not None:
            found.setdefault(each["length"], {})["perplexity_ratio"] = each["ratio"]
    if len(found) < 2:
        return row, None
    order = {"unknown": 0, "safe": 1, "try": 2, "no": 3}
    worst = max(found, key=lambda at: (order[grade_of(found[at])], found[at].get("kl") or 0.0))
    well = [at for at in found if grade_of(found[at]) == "safe"]
    return found[worst], max(well, default=None)


def _predictions(row: Row) -> str:
    grade, ratio = grade_of(row), row.get("perplexity_ratio")
    if grade == "safe":
        kl = row.get("kl") or 0.0
        return "same predictions" if kl < SAME else f"nearly the same predictions (KL {kl:.3f})"
    if grade == "unknown":
        return ""
    if ratio is not None and abs(ratio - 1) >= SAME_PERPLEXITY:
        return f"perplexity {figures.change(ratio)}"
    return f"{'small' if grade == 'try' else 'large'} differences in the predictions (KL {figures.nats(row.get('kl'))})"


def _changed(row: Row) -> str:
    """How many answers have another score, where that is known; a percentage says little for a handful."""
    number, pairs = row.get("changed"), row.get("pairs") or 0
    return "" if not number or not pairs else f"{number} of {figures.count(pairs, 'answer')} changed"


def _score_is_lower(row: Row) -> bool:
    _, high = figures.interval(row, "difference_low", "difference_high", "pairs")
    return high is not None and high < 0


def _speed(row: Row) -> tuple[bool | None, str]:
    """(whether the prefill gains, words); None where no speed was measured."""
    up = row.get("speed_up")
    if up is None:
        return None, ""
    if figures.within_noise(row):
        return False, "prefill as fast, within noise"
    times = figures.ratio(max(up, 1 / up))
    low, high = row.get("speed_up_low"), row.get("speed_up_high")
    single = " (one round)" if low is not None and low == high else ""
    return up > 1, f"{times} {'faster' if up > 1 else 'slower'} prefill{single}"


def _not_here(row: Row, metrics: Row, best: int | None) -> str:
    if best is not None:
        return f"only up to {best:,} tokens, where predictions are the same"
    return f"not{_at(metrics)}"


def _where(row: Row, metrics: Row) -> str:
    """What an approximate plugin does at one length says nothing of another; an exact one is exact everywhere."""
    return _at(metrics) if _approximate(row) else ""


def _at(metrics: Row) -> str:
    lengths = {each["length"] for name in ("agreement", "loss") for each in metrics.get(name, ())}
    return " at this length" if len(lengths) < 2 else " at these lengths"


def _approximate(row: Row) -> bool:
    name = re.split(r"[: ]", row["attn"])[0]
    plugin = next((each for each in PLUGINS.values() if name in (each.name, each.short)), None)  # the page's are short
    return plugin is not None and not plugin.exact


def _never_ran(row: Row) -> bool:
    """Whether an approximate plugin saw everything in every call that was recorded."""
    plans = row.get("plans") or ()
    return _approximate(row) and bool(plans) and all(plan.startswith("dense") for plan in plans)
