"""The charts of speed: score against speed-up, speed-ups over length with their rounds, peak memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..tables import Table
from ..wording import figures
from . import axes, svg
from .sections import Chart, Numbers, ends_text, hundred, score_text, steps_chart
from .svg import Point, Series

Row = Mapping[str, Any]


def trade_charts(metrics: Row, numbers: Numbers) -> list[Chart]:
    """Score against prefill speed-up, at every length that has both; over all tasks."""
    speed = {(row["length"], row["attn"]): row["speed_up"] for row in metrics["speed"] if row["speed_up"]}
    rows = [row for row in metrics["lengths"] if (row["length"], row["attn"]) in speed]
    made = []
    scales = _trade_axes(rows, [speed[row["length"], row["attn"]] for row in rows])
    for length in sorted({row["length"] for row in rows}):
        here = [row for row in rows if row["length"] == length]
        ups = {attn: up for (at, attn), up in speed.items() if at == length}
        made.append(_trade(f"{length:,} tokens", here, ups, numbers, scales))
    if not rows:  # no length was both timed and scored: the average score against the speed-up at the longest length
        overall = [row for row in metrics["overall"] if row.get("speed_up") and row["score"] is not None]
        named = [{**row, "mean": row["score"], "low": row["score_low"], "high": row["score_high"]} for row in overall]
        if named:
            caption = f"mean score, speed-up at {named[0]['speed_length']:,} tokens"
            ups = {row["attn"]: row["speed_up"] for row in named}
            made.append(_trade(caption, named, ups, numbers, _trade_axes(named, list(ups.values()))))
    return made


def speed_charts(metrics: Row, numbers: Numbers) -> list[Chart]:
    """Speed-up of prefill and decoding, and peak memory, over length."""
    wanted: tuple[tuple[str, str, str, Callable[[Row], str], float], ...] = (
        ("Prefill speed-up", "speed_up", "times as fast", figures.speed, 1),
        ("Decode speed-up", "decode_speed_up", "times as fast", _decode, 1),
        ("Peak memory", "peak_bytes", "MiB", figures.memory, 2**20),
    )
    made = []
    for caption, name, unit, text, scale in wanted:
        rows = [row for row in metrics["speed"] if row[name] is not None]
        if rows:
            values = [{**row, "mean": row[name] / scale, "said": text(row), **_rounds(row, name)} for row in rows]
            same_unit = [each for _, other, u, _, s in wanted if u == unit for each in _values(metrics, other, s)]
            axis = axes.linear(unit, same_unit, lambda value: f"{value:g}", include=(0,))
            level = 1.0 if name != "peak_bytes" else None
            made.append(steps_chart(caption, values, numbers, axis, lambda row: row["said"], level))
    return made


def _values(metrics: Row, name: str, scale: float) -> list[float]:
    """All values of a column of the speed rows, the ends of their rounds among them."""
    found = [row.get(f"{name}{end}") for row in metrics["speed"] for end in ("", "_low", "_high")]
    return [value / scale for value in found if value is not None]


def _rounds(row: Row, name: str) -> dict[str, Any]:
    """The ends of the rounds as the ends of a bar; `n` lets them be drawn however few the rounds are."""
    return {"low": row.get(f"{name}_low"), "high": row.get(f"{name}_high"), "n": figures.FEW}


def _decode(row: Row) -> str:
    return figures.speed(row, "decode_speed_up")


def _trade_axes(rows: Sequence[Row], speed: Sequence[float]) -> tuple[axes.Axis, axes.Axis]:
    """x and y of all trade charts of a run, so that they can be compared."""
    ratios = [1.0, *speed]
    x = axes.linear("prefill speed-up", (0.95 * min(ratios), 1.05 * max(ratios)), lambda value: f"{value:g}×")
    ends = [100 * end for row in rows for end in (row["mean"], *figures.interval(row)) if end is not None]
    if ends and min(ends) == max(ends):
        ends = [max(0.0, ends[0] - 25), min(100.0, ends[0] + 25)]  # no score is above 100 %
    return x, axes.linear("score, %", ends or [0.0, 100.0], lambda value: f"{value:g}")


def _trade(
    caption: str,
    rows: Sequence[Row],
    speed: Mapping[str, float],
    numbers: Numbers,
    scales: tuple[axes.Axis, axes.Axis],
) -> Chart:
    x, y = scales
    series = []
    for row in rows:
        mean, low, high = map(hundred, (row["mean"], *figures.interval(row)))
        said = f"{score_text(row)} at {figures.ratio(speed[row['attn']])}"
        series.append(
            Series(row["attn"], numbers[row["attn"]], [Point(speed[row["attn"]], mean or 0.0, said, low, high)])
        )
    cells = [[row["attn"], figures.ratio(speed[row["attn"]]), score_text(row)] for row in rows]
    data = Table(caption, ["attention", "prefill speed-up", "score, %"], cells)
    words = "Score against prefill speed-up, upper right is better. " + ends_text(series)
    return Chart(caption, svg.plot(caption, words, series, x, y, joined=False), data)
