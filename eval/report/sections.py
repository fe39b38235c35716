"""The charts of a run: from the rows of metrics.json to axes, series and descriptions in words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import axes, charts, figures
from .charts import Point, Series
from .tables import Table

Row = Mapping[str, Any]
KL_FLOOR = 1e-8  # nats; below it is rounding


@dataclass(frozen=True)
class Chart:
    """A finished chart: its caption, its SVG, and the same data as a table."""

    caption: str
    svg: str
    data: Table


Numbers = Mapping[str, int]  # attention -> number of its series


def score_charts(metrics: Row, numbers: Numbers) -> list[Chart]:
    """Score over length: the average over tasks where there are several, then each task."""
    tasks = sorted({row["task"] for row in metrics["scores"] if row["mean"] is not None})
    groups = [(task, [row for row in metrics["scores"] if row["task"] == task]) for task in tasks]
    if len(tasks) > 1:
        groups.insert(0, (f"mean of {len(tasks)} tasks", metrics["lengths"]))
    return [_over_length(caption, rows, numbers) for caption, rows in groups]


def depth_charts(metrics: Row, numbers: Numbers) -> list[Chart]:
    """Needle depth x length, one heat map per attention."""
    lengths = sorted({row["length"] for row in metrics["depths"]})
    depths = sorted({(row["begin"], row["end"]) for row in metrics["depths"]})
    made = []
    for label in numbers:
        rows = [row for row in metrics["depths"] if row["attn"] == label]
        if not rows:
            continue
        cells = {(depths.index((row["begin"], row["end"])), lengths.index(row["length"])): row["mean"] for row in rows}
        worst = min(rows, key=lambda row: row["mean"])
        words = f"Mean score by needle depth and prompt length for {label}. Lowest: {_at_depth(worst)}."
        heads, names = [axes.short(length) for length in lengths], [_depth(*place) for place in depths]
        data = Table(label, ["length", "depth, %", "n", "score, %"], [_depth_cells(row) for row in rows], words=2)
        made.append(Chart(label, charts.heat_map(f"Needle depth, {label}", words, heads, names, cells), data))
    return made


def position_charts(metrics: Row, numbers: Numbers) -> list[Chart]:
    """KL and perplexity over the position in the text, for each task and length."""
    made = []
    for task, length in sorted({(row["task"], row["length"]) for row in metrics["agreement"] if row["buckets"]}):
        rows = [row for row in metrics["agreement"] if (row["task"], row["length"]) == (task, length)]
        found = {row["attn"]: [(b, b["kl"]) for b in row["buckets"]] for row in rows}
        values = [kl for buckets in found.values() for _, kl in buckets]
        caption = f"KL to the baseline, {_text(metrics['agreement'], task, length)}"
        made.append(_over_position(caption, found, numbers, axes.decades("nats", values, floor=KL_FLOOR), figures.nats))
    for length, found in _perplexities(metrics).items():
        values = [value for buckets in found.values() for _, value in buckets]
        axis = axes.linear("perplexity", values, lambda value: f"{value:g}")
        made.append(_over_position(f"Perplexity, {length}", found, numbers, axis, figures.perplexity))
    return made


def trade_charts(metrics: Row, numbers: Numbers) -> list[Chart]:
    """Score against prefill speed-up, at every length that has both; over all tasks."""
    speed = {(row["length"], row["attn"]): row["speed_up"] for row in metrics["speed"] if row["speed_up"]}
    rows = [row for row in metrics["lengths"] if (row["length"], row["attn"]) in speed]
    made = []
    for length in sorted({row["length"] for row in rows}):
        here = [row for row in rows if row["length"] == length]
        made.append(
            _trade(f"{length:,} tokens", here, {attn: up for (at, attn), up in speed.items() if at == length}, numbers)
        )
    if not rows:  # no length was both timed and scored: the average score against the speed-up at the longest length
        overall = [row for row in metrics["overall"] if row.get("speed_up") and row["score"] is not None]
        named = [{**row, "mean": row["score"], "low": row["score_low"], "high": row["score_high"]} for row in overall]
        if named:
            caption = f"mean score, speed-up at {named[0]['speed_length']:,} tokens"
            made.append(_trade(caption, named, {row["attn"]: row["speed_up"] for row in named}, numbers))
    return made


def speed_charts(metrics: Row, numbers: Numbers) -> list[Chart]:
    """Speed-up of prefill and decoding, and peak memory, over length."""
    wanted: tuple[tuple[str, str, str, Callable[[float | None], str], float], ...] = (
        ("Prefill speed-up", "speed_up", "times as fast", figures.ratio, 1),
        ("Decode speed-up", "decode_speed_up", "times as fast", figures.ratio, 1),
        ("Peak memory", "peak_bytes", "MiB", figures.size, 2**20),
    )
    made = []
    for caption, name, unit, text, scale in wanted:
        rows = [row for row in metrics["speed"] if row[name] is not None]
        if rows:
            values = [{**row, "mean": row[name] / scale, "said": text(row[name])} for row in rows]
            axis = axes.linear(unit, [row["mean"] for row in values], lambda value: f"{value:g}", include=(0,))
            level = 1.0 if name != "peak_bytes" else None
            made.append(_steps(caption, values, numbers, axis, lambda row: row["said"], level))
    return made


def _over_length(caption: str, rows: Sequence[Row], numbers: Numbers) -> Chart:
    values = [{**row, **{name: _hundred(row[name]) for name in ("mean", "low", "high")}} for row in rows if row["n"]]
    axis = axes.linear("score, %", (), lambda value: f"{value:g}", include=(0, 100))
    return _steps(caption, values, numbers, axis, lambda row: f"{row['mean']:.1f}")


def _steps(
    caption: str,
    rows: Sequence[Row],
    numbers: Numbers,
    y: axes.Axis,
    text: Callable[[Row], str],
    level: float | None = None,
) -> Chart:
    """A chart over the lengths, `mean` of every row as its y."""
    lengths = sorted({row["length"] for row in rows})
    x = axes.steps("tokens", map(axes.short, lengths))
    series = [
        Series(
            label,
            number,
            [
                Point(lengths.index(row["length"]), row["mean"], _at(row, text), *figures.interval(row))
                for row in rows
                if row["attn"] == label
            ],
        )
        for label, number in numbers.items()
    ]
    series = [one for one in series if one.points]
    data = Table(
        caption, ["length", "attention", y.name], [[f"{r['length']:,}", r["attn"], text(r)] for r in rows], words=2
    )
    words = f"{y.name} over length. " + _ends(series)
    return Chart(caption, charts.plot(caption, words, series, x, y, dodge=True, level=level), data)


def _over_position(
    caption: str,
    found: Mapping[str, Sequence[tuple[Row, float]]],
    numbers: Numbers,
    y: axes.Axis,
    text: Callable[[float | None], str],
) -> Chart:
    end = max(bucket["end"] for buckets in found.values() for bucket, _ in buckets)
    x = axes.positions("position, tokens", int(end))
    series = [
        Series(
            label,
            number,
            [
                Point((b["begin"] + b["end"]) / 2, value, f"{text(value)} at {b['begin']:,} to {b['end']:,}")
                for b, value in found[label]
            ],
        )
        for label, number in numbers.items()
        if label in found
    ]
    rows = [
        [f"{bucket['begin']:,}", f"{bucket['end']:,}", label, text(value)]
        for label, buckets in found.items()
        for bucket, value in buckets
    ]
    data = Table(caption, ["from", "to", "attention", y.name], rows, words=3)
    return Chart(caption, charts.plot(caption, f"{caption}, by position. " + _ends(series), series, x, y), data)


def _trade(caption: str, rows: Sequence[Row], speed: Mapping[str, float], numbers: Numbers) -> Chart:
    ratios = [1.0, *speed.values()]
    x = axes.linear("prefill speed-up", (0.95 * min(ratios), 1.05 * max(ratios)), lambda value: f"{value:g}×")
    ends = [100 * end for row in rows for end in (row["mean"], *figures.interval(row)) if end is not None]
    y = axes.linear("score, %", ends, lambda value: f"{value:g}")
    series = []
    for row in rows:
        mean, low, high = map(_hundred, (row["mean"], *figures.interval(row)))
        said = f"{_score(row)} at {figures.ratio(speed[row['attn']])}"
        series.append(
            Series(row["attn"], numbers[row["attn"]], [Point(speed[row["attn"]], mean or 0.0, said, low, high)])
        )
    cells = [[row["attn"], figures.ratio(speed[row["attn"]]), _score(row)] for row in rows]
    data = Table(caption, ["attention", "prefill speed-up", "score, %"], cells)
    words = "Score against prefill speed-up, upper right is better. " + _ends(series)
    return Chart(caption, charts.plot(caption, words, series, x, y, joined=False), data)


def _perplexities(metrics: Row) -> dict[str, dict[str, list[tuple[Row, float]]]]:
    """By text and attention: perplexity of each bucket, from the losses or else from the agreement's."""
    made: dict[str, dict[str, list[tuple[Row, float]]]] = {}
    source = [row for row in metrics["loss"] if row["buckets"]] or metrics["agreement"]
    for row in source:
        into = made.setdefault(_text(source, row["task"], row["length"]), {})
        buckets = [bucket for bucket in row["buckets"] if bucket.get("perplexity") is not None]
        into[row["attn"]] = [(bucket, bucket["perplexity"]) for bucket in buckets]
        if source is metrics["agreement"]:
            into[metrics["baseline"]] = [(bucket, bucket["baseline_perplexity"]) for bucket in buckets]
    return {name: found for name, found in made.items() if any(found.values())}


def _text(rows: Sequence[Row], task: str, length: int) -> str:
    """The text's length, and its task where there are several."""
    return ("" if len({row["task"] for row in rows}) == 1 else f"{task}, ") + f"{length:,} tokens"


def _ends(series: Iterable[Series]) -> str:
    return " ".join(
        f"{one.label}: from {one.points[0].text} to {one.points[-1].text}."
        if len(one.points) > 1
        else f"{one.label}: {one.points[0].text}."
        for one in series
        if one.points
    )


def _at(row: Row, text: Callable[[Row], str]) -> str:
    return f"{text(row)} at {row['length']:,} tokens"


def _at_depth(row: Row) -> str:
    return f"{figures.percent(row['mean'])} % at depth {_depth(row['begin'], row['end'])} % of {row['length']:,} tokens"


def _depth(begin: float, end: float) -> str:
    return f"{100 * begin:.3g}" + (f"{figures.NOTHING}{100 * end:.3g}" if end > begin else "")


def _depth_cells(row: Row) -> list[str]:
    return [f"{row['length']:,}", _depth(row["begin"], row["end"]), str(row["n"]), figures.percent(row["mean"])]


def _score(row: Row) -> str:
    """The mean in per cent, or a count where samples are few."""
    return figures.score(row) if figures.few(row) else figures.percent(row["mean"])


def _hundred(share: float | None) -> float | None:
    return None if share is None else 100 * share
