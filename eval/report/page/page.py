"""report.html: one file with its style, its script and its data inside, which asks the network for nothing."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from hf_attn_plugins.plugins import PLUGINS

from .. import tables
from ..charts import sections, speed_sections, svg
from ..charts.svg import Series
from ..wording import figures
from ..wording.findings import sentences
from ..wording.names import renamed, short_names
from ..wording.verdict import verdicts
from ..wording.words import MEANINGS, task_meaning
from .html import breakable, folded, side_by_side, table

Row = Mapping[str, Any]
HERE = Path(__file__).parent
LISTED_ERRORS = 50


@dataclass(frozen=True)
class Report:
    """What a page shows.

    Attributes:
        config, environment, metrics: the run's files of these names.
        samples: what `samples.sample_data` gives, or empty: then the page has no samples to leaf through.
        errors: one line each.
        notes: warnings, shown above everything else.
    """

    title: str
    config: Row
    environment: Row
    metrics: Row
    samples: Row = field(default_factory=dict)
    errors: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def numbers(self) -> dict[str, int]:
        """Short name -> number of its colour and marker, 0 for the (first) baseline."""
        first = self.names.get(self.baselines[0], self.baselines[0])
        labels = [self.names[row["attn"]] for row in self.metrics["overall"]]
        others = [label for label in labels if label != first]
        return {label: 0 if label == first else others.index(label) + 1 for label in labels}

    @property
    def names(self) -> dict[str, str]:
        """Attention -> short name; the same for every part of the page."""
        return short_names(row["attn"] for row in self.metrics["overall"])

    @property
    def baselines(self) -> list[str]:
        """The baseline; in a leaderboard, that of every run."""
        return self.metrics.get("baselines", [self.metrics["baseline"]])


def render(report: Report) -> str:
    """The whole page."""
    parts = {
        "kicker": "Long-context evaluation",
        "title": escape(report.title),
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "script": (HERE / "page.js").read_text(encoding="utf-8"),
        "about": _about(report),
        "body": _body(report),
        "data": embedded({**report.samples, "names": [report.names[label] for label in report.samples["attentions"]]})
        if report.samples
        else embedded({}),
    }
    return filled(parts)


def filled(parts: Mapping[str, str]) -> str:
    """page.html with HTML in the places of `parts`: kicker, title, style, about, body, data, script."""
    template = (HERE / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)  # one pass: values are never read again


def embedded(value: Any) -> str:
    """JSON that may stand inside a <script> element: a text with </script> or <!-- in it cannot end it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _about(report: Report) -> str:
    known = dict(tables.facts(report.config, report.environment))
    return escape(" · ".join(known[name] for name in ("model", "dtype", "hardware", "date") if name in known))


def _facts(report: Report) -> str:
    shown = tables.facts(report.config, report.environment)
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{breakable(text)}</dd></div>" for name, text in shown)
    return f'<dl class="facts">{items}</dl>'


def _body(report: Report) -> str:
    metrics, numbers = renamed(report.metrics, report.names), report.numbers
    legend = _legend(numbers)
    position = sections.position_charts(metrics, numbers)
    edges = EDGES if any('class="edge' in chart.svg for chart in position) else ""
    parts = [
        ("overview", "Overview", _overview(report, metrics)),
        ("scores", "Score over length", _charts(sections.score_charts(metrics, numbers), legend, SCORES)),
        ("trade", "Score against speed-up", _charts(speed_sections.trade_charts(metrics, numbers), legend, TRADE)),
        ("depth", "Needle depth", _charts(sections.depth_charts(metrics, numbers), "", DEPTH)),
        (
            "position",
            "KL and perplexity by position",
            _charts(position, legend, POSITION + edges),
        ),
        ("speed", "Speed and memory", _charts(speed_sections.speed_charts(metrics, numbers), legend, SPEED)),
        ("tables", "All numbers", "".join(map(folded, tables.details(metrics)))),
        ("errors", "Errors", _errors(report)),
        ("samples", "Samples", _samples(report, numbers)),
        ("run", "How it was run", _facts(report)),
    ]
    shown = [(name, head, body) for name, head, body in parts if body]
    links = "".join(f'<li><a href="#{name}">{head}</a></li>' for name, head, _ in shown)
    notes = "".join(f'<p class="warning">{escape(note)}</p>' for note in report.notes)
    nav = f'<nav aria-label="Sections"><ul>{links}</ul></nav>'
    return f"{notes}{_verdicts(report, metrics)}{nav}" + "".join(
        f'<section id="{name}" aria-labelledby="{name}-head"><h2 id="{name}-head">{head}</h2>{body}</section>'
        for name, head, body in shown
    )


SCORES = "Mean score of each task, from ten samples on with its 95 % bootstrap interval over samples."
TRADE = (
    "Further up is more accurate, further right is faster; bars are 95 % intervals of the score, from ten samples on."
)
DEPTH = (
    "Mean score in per cent by place of the needle, below ten samples a count: 0 % is the beginning of the context, "
    "100 % its end. An empty cell had no sample."
)
POSITION = (
    "Next-token predictions on the same text, in buckets of positions; lower is closer and better. KL: how far the "
    "predicted probabilities are from the baseline's, 0 is equal, above 0.1 shows in the answers."
)
EDGES = (
    " Dashed lines are the edges of an attention's blocks: the first tokens of a block see little of the text just "
    "before them, so they suffer most."
)
SPEED = "Medians, bars from the slowest to the fastest round; ratios to the baseline, above 1 is faster."


def _verdicts(report: Report, metrics: Row) -> str:
    """One line for each attention that a person can act on, and the numbers behind it."""
    numbers, why = report.numbers, dict(sentences(metrics))
    badges = {report.names[entry["label"]]: _badge(entry.get("implementation")) for entry in report.config["attn"]}
    items = ""
    for one in verdicts(metrics):
        swatch = svg.swatch(Series(one.attn, numbers[one.attn], ()))
        because = f"<p>It {escape(why[one.attn])}</p>" if one.attn in why else ""
        items += (
            f'<li class="{one.grade}">{swatch}<div><strong>{breakable(one.attn)}</strong> {badges.get(one.attn, "")} '
            f'<span class="verdict">{escape(one.text)}.</span>{because}</div></li>'
        )
    return f'<ul class="verdicts" aria-label="Verdicts">{items}</ul>' if items else ""


def _overview(report: Report, metrics: Row) -> str:
    numbers, full = report.numbers, {short: label for label, short in report.names.items()}
    headline = tables.headline(metrics)
    names = {}
    for label, number in numbers.items():
        code = f"<code>{breakable(full[label])}</code>" if full.get(label, label) != label else ""
        swatch = svg.swatch(Series(label, number, ()))
        names[label] = f"{swatch} <span>{breakable(label)} {code}</span>"
    many = [row for row in metrics["overall"] if not figures.few(row, "pairs")]
    names_of_ends = ("difference_low", "difference_high", "difference")
    reach = max((abs(row[name] or 0) for row in many for name in names_of_ends), default=0)
    baselines = metrics.get("baselines", [metrics["baseline"]])
    rulers = {row["attn"]: _ruler(row, reach) for row in many if row["attn"] not in baselines}
    meanings = "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>" for name, text in MEANINGS.items())
    return (
        f"{table(headline, 'headline', names, rulers)}{side_by_side(headline)}"
        f'<p class="note">{escape(headline.note)}</p>{_ran(metrics, numbers)}'
        f'<h3 class="words-head">What the words mean</h3><dl class="facts words">{meanings}</dl>'
    )


def _ran(metrics: Row, numbers: Mapping[str, int]) -> str:
    """What every attention really did: its plans, a line each."""
    items = ""
    for label, plans in tables.ran(metrics):
        lines = "".join(f"<div>{breakable(plan)}</div>" for plan in plans)
        items += (
            f"<div><dt>{svg.swatch(Series(label, numbers[label], ()))} {breakable(label)}</dt><dd>{lines}</dd></div>"
        )
    return f'<h3>What ran</h3><dl class="facts ran">{items}</dl>' if items else ""


def _badge(implementation: str | None) -> str:
    plugin = PLUGINS.get(implementation or "")
    if plugin is None:
        return ""
    return '<small class="badge exact">exact</small>' if plugin.exact else '<small class="badge">approximate</small>'


def _ruler(row: Row, reach: float) -> str:
    """The difference as a dot, its interval as a bar, on a line whose middle is zero; `reach` is the line's half."""
    if row["difference"] is None:
        return ""
    place = lambda value: 60 + 54 * value / max(reach, 0.01)  # noqa: E731
    low, high = (
        row[name] if row[name] is not None else row["difference"] for name in ("difference_low", "difference_high")
    )
    kind = " zero" if row["difference"] == low == high == 0 else ""
    return (
        f'<svg class="ruler{kind}" viewBox="0 0 120 14" aria-hidden="true" focusable="false">'
        f'<path class="grid" d="M2 7H118"/><path class="middle" d="M60 1V13"/>'
        f'<path class="bar" d="M{place(low):.1f} 7H{place(high):.1f}"/>'
        f'<circle cx="{place(row["difference"]):.1f}" cy="7" r="4"/></svg>'
    )


def _legend(numbers: Mapping[str, int]) -> str:
    items = (f"<li>{svg.swatch(Series(label, number, ()))}{breakable(label)}</li>" for label, number in numbers.items())
    return f'<ul class="legend">{"".join(items)}</ul>'


def _charts(made: Sequence[sections.Chart], legend: str, note: str) -> str:
    figures = "".join(
        f"<figure><figcaption>{breakable(chart.caption)}{_meaning(chart.caption)}</figcaption>{chart.svg}"
        f"<details><summary>Data</summary>{table(chart.data)}</details></figure>"
        for chart in made
    )
    columns = {1: "one", 2: "two", 4: "two"}.get(len(made), "three")  # no row of charts with a hole in it
    return f'<p class="note">{note}</p>{legend}<div class="charts {columns}">{figures}</div>' if made else ""


def _meaning(caption: str) -> str:
    said = task_meaning(caption)
    return f" <small>{said}</small>" if said else ""


def _errors(report: Report) -> str:
    listed = "".join(f"<li>{escape(text)}</li>" for text in report.errors[:LISTED_ERRORS])
    more = (
        f"<p class=note>The first {LISTED_ERRORS} of {len(report.errors)}.</p>"
        if len(report.errors) > LISTED_ERRORS
        else ""
    )
    return f'<ul class="errors">{listed}</ul>{more}' if listed else ""


def _samples(report: Report, numbers: Mapping[str, int]) -> str:
    if not report.samples:
        return ""
    shorts = [report.names[label] for label in report.samples["attentions"]]
    swatches = "".join(svg.swatch(Series(label, numbers[label], ())) for label in shorts)
    return (HERE / "samples.html").read_text(encoding="utf-8").replace("{{swatches}}", swatches)
