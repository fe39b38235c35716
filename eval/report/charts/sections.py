"""The charts of a run: from the rows of metrics.json to axes, series and descriptions in words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..summary.answers import PARTS
from ..tables import Table
from ..wording import figures
from . import axes, svg
from .svg import Point, Series

Row = Mapping[str, Any]
KL_FLOOR = 1e-8  # nats; below it is rounding
MOST_EDGES = 16  # blocks of a text whose edges are drawn


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
    if any(end > begin for begin, end in depths):  # parts of the context: those without a needle are shown as empty
        depths = sorted({*depths, *((part / PARTS, (part + 1) / PARTS) for part in range(PARTS))})
    made = []
    for label in numbers:
        rows = [row for row in metrics["depths"] if row["attn"] == label]
        if not rows:
            continue
        cells = {
            (depths.index((row["begin"], row["end"])), lengths.index(row["length"])): (row["mean"], _cell(row))
            for row in rows
        }
        worst = min(rows, key=lambda row: row["mean"])
        words = f"Mean score by needle depth and prompt length for {label}. Lowest: {_at_depth(worst)}."
        heads, names = [axes.short(length) for length in lengths], [_depth(*place) for place in depths]
        data = Table(label, ["length", "depth, %", "n", "score, %"], [_depth_cells(row) for row in rows], words=2)
        drawn = svg.heat_map(f"Needle depth, {label}", words, heads, names, cells, numbers[label])
        made.append(Chart(label, drawn, data))
    return made


def position_charts(metrics: Row, numbers: Numbers) -> list[Chart]:
    """KL and perplexity over the position in the text, for each task and length."""
    made = []
    values = [bucket["kl"] for row in metrics["agreement"] for bucket in row["buckets"]]
    kl = axes.decades("nats", values, floor=KL_FLOOR) if values else None  # the same for every length
    for task, length in sorted({(row["task"], row["length"]) for row in metrics["agreement"] if row["buckets"]}):
        rows = [row for row in metrics["agreement"] if (row["task"], row["length"]) == (task, length)]
        found = {row["attn"]: [(b, b["kl"]) for b in row["buckets"]] for row in rows}
        caption = f"KL to the baseline, {_text(metrics['agreement'], task, length)}"
        edges = [(at, numbers[row["attn"]]) for row in rows if row["attn"] in numbers for at in block_edges(row)]
        assert kl is not None
        made.append(_over_position(caption, found, numbers, kl, figures.nats, edges))
    perplexities = _perplexities(metrics)
    values = [value for found in perplexities.values() for buckets in found.values() for _, value in buckets]
    for length, found in perplexities.items():
        axis = axes.linear("perplexity", values, lambda value: f"{value:g}")
        made.append(_over_position(f"Perplexity, {length}", found, numbers, axis, figures.perplexity))
    return made


def block_edges(row: Row) -> list[int]:
    """Where the blocks of an attention begin in its text, from the plan that ran; none where they are very many."""
    sizes = [int(found[1]) for plan in row.get("plans") or () if (found := re.search(r"block_size (\d+)", plan))]
    if not sizes or row["length"] / sizes[0] > MOST_EDGES:
        return []
    return list(range(sizes[0], row["length"], sizes[0]))


def _over_length(caption: str, rows: Sequence[Row], numbers: Numbers) -> Chart:
    values = [{**row, **{name: hundred(row[name]) for name in ("mean", "low", "high")}} for row in rows if row["n"]]
    axis = axes.linear("score, %", (), lambda value: f"{value:g}", include=(0, 100))
    return steps_chart(caption, values, numbers, axis, lambda row: f"{row['mean']:.1f}{_of(row)}")


def steps_chart(
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
    words = f"{y.name} over length. " + ends_text(series)
    return Chart(caption, svg.plot(caption, words, series, x, y, dodge=True, level=level), data)


def _over_position(
    caption: str,
    found: Mapping[str, Sequence[tuple[Row, float]]],
    numbers: Numbers,
    y: axes.Axis,
    text: Callable[[float | None], str],
    edges: Sequence[tuple[int, int]] = (),
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
    words = f"{caption}, by position. " + ends_text(series)
    if edges:
        words += f" Blocks begin at {', '.join(f'{at:,}' for at in sorted({at for at, _ in edges}))}."
    return Chart(caption, svg.plot(caption, words, series, x, y, edges=edges), data)


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


def ends_text(series: Iterable[Series]) -> str:
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


def _cell(row: Row) -> str:
    """A cell of a heat map: the score in per cent, a count where samples are few."""
    return f"{round(row['mean'] * row['n'], 1):g}/{row['n']}" if figures.few(row) else f"{100 * row['mean']:.0f}"


def _of(row: Row) -> str:
    """How many samples a score rests on, where they are few: " (1 of 2)"."""
    return f" ({round(row['mean'] / 100 * row['n'], 2):g} of {row['n']})" if figures.few(row) else ""


def score_text(row: Row) -> str:
    """The mean in per cent, or a count where samples are few."""
    return figures.score(row) if figures.few(row) else figures.percent(row["mean"])


def hundred(share: float | None) -> float | None:
    return None if share is None else 100 * share
