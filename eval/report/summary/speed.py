"""Speed rows: medians of each attention, and its ratios to the baseline within the same round."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...records import Generation, Loss, Prediction, Sample, Speed

Row = dict[str, Any]
STAGES = {"prefill": "speed_up", "first_token": "first_token_speed_up", "decode_per_token": "decode_speed_up"}


@dataclass(frozen=True)
class _Timing:
    length: int
    key: str  # what is compared with what: the round, or the sample
    attn: str
    seconds: Mapping[str, float]
    peak_bytes: int | None


def speed_rows(
    labels: list[str], baseline: str, samples: Mapping[str, Sample], predictions: Iterable[Prediction]
) -> list[Row]:
    """One row per (length, attn): median seconds, peak bytes, and medians of (baseline's seconds / these) per pair.

    `speed_up_low` and `speed_up_high` are the smallest and the largest of those ratios.

    Taken from the timed rounds; where a run has none, from the seconds of its generations, else from its losses
    (`source` says which): those were not repeated, and each pair is one sample.
    """
    done = [one for one in predictions if one.error is None]
    for kind in (Speed, Generation, Loss):
        timings = [_timing(one, samples) for one in done if isinstance(one, kind) and one.seconds]  # type: ignore[attr-defined]
        if timings:
            return _rows(labels, baseline, timings, kind.kind)
    return []


def headline(row: Row) -> Row:
    """The columns of a speed row that the headline table shows."""
    names = [f"{name}{end}" for name in STAGES.values() for end in ("", "_low", "_high")]
    names += ["peak_bytes", "memory_ratio"]
    return {"speed_length": row["length"], "speed_source": row["source"], **{name: row.get(name) for name in names}}


def _timing(one: Any, samples: Mapping[str, Sample]) -> _Timing:
    if isinstance(one, Speed):
        return _Timing(one.length, str(one.round), one.attn, one.seconds, one.peak_bytes)
    seconds = {name: one.seconds[name] for name in ("prefill", "first_token") if name in one.seconds}
    later = getattr(one, "new_tokens", 0) - 1  # the first token comes with the prefill
    if later > 0 and "decode" in one.seconds:
        seconds["decode_per_token"] = one.seconds["decode"] / later
    return _Timing(samples[one.sample].length, one.sample, one.attn, seconds, one.peak_bytes)


def _rows(labels: list[str], baseline: str, timings: Sequence[_Timing], source: str) -> list[Row]:
    cells: defaultdict[tuple[int, str], dict[str, _Timing]] = defaultdict(dict)
    for one in timings:
        cells[one.length, one.attn][one.key] = one
    rows = []
    for length in sorted({length for length, _ in cells}):
        base = cells.get((length, baseline), {})
        for label in (label for label in labels if (length, label) in cells):
            own = cells[length, label]
            pairs = [(own[key], base[key]) for key in own if key in base]
            row: Row = {"length": length, "attn": label, "n": len(own), "source": source}
            row |= {stage: _median(one.seconds.get(stage) for one in own.values()) for stage in STAGES}
            for stage, name in STAGES.items():
                ratios = [_ratio(b.seconds.get(stage), a.seconds.get(stage)) for a, b in pairs]
                known = [ratio for ratio in ratios if ratio is not None]
                row[name] = _median(ratios)
                row |= {f"{name}_low": min(known, default=None), f"{name}_high": max(known, default=None)}
            row["peak_bytes"] = _median(one.peak_bytes for one in own.values())
            row["memory_ratio"] = _median(_ratio(a.peak_bytes, b.peak_bytes) for a, b in pairs)
            rows.append(row)
    return rows


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


def _median(values: Iterable[float | None]) -> float | None:
    present = [value for value in values if value is not None]
    return statistics.median(present) if present else None
