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

from . import charts, figures, sections, tables
from .charts import Series
from .findings import sentences
from .tables import Table

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
        """Attention -> number of its colour and marker, 0 for the (first) baseline."""
        first = self.baselines[0]
        labels = [row["attn"] for row in self.metrics["overall"]]
        others = [label for label in labels if label != first]
        return {label: 0 if label == first else others.index(label) + 1 for label in labels}

    @property
    def baselines(self) -> list[str]:
        """The baseline; in a leaderboard, that of every run."""
        return self.metrics.get("baselines", [self.metrics["baseline"]])


def render(report: Report) -> str:
    """The whole page."""
    parts = {
        "title": escape(report.title),
        "style": (HERE / "page.css").read_text(encoding="utf-8"),
        "script": (HERE / "page.js").read_text(encoding="utf-8"),
        "about": _about(report),
        "body": _body(report),
        "data": embedded(report.samples),
    }
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
    items = "".join(f"<div><dt>{escape(name)}</dt><dd>{_breakable(text)}</dd></div>" for name, text in shown)
    return f'<dl class="facts">{items}</dl>'


def _body(report: Report) -> str:
    metrics, numbers = report.metrics, report.numbers
    legend = _legend(numbers)
    parts = [
        ("overview", "Overview", _overview(report)),
        ("scores", "Score over length", _charts(sections.score_charts(metrics, numbers), legend, SCORES)),
        ("trade", "Score against speed-up", _charts(sections.trade_charts(metrics, numbers), legend, TRADE)),
        ("depth", "Needle depth", _charts(sections.depth_charts(metrics, numbers), "", DEPTH)),
        (
            "position",
            "KL and perplexity by position",
            _charts(sections.position_charts(metrics, numbers), legend, POSITION),
        ),
        ("speed", "Speed and memory", _charts(sections.speed_charts(metrics, numbers), legend, SPEED)),
        ("tables", "All numbers", "".join(map(_folded, tables.details(metrics)))),
        ("errors", "Errors", _errors(report)),
        ("samples", "Samples", _samples(report, numbers)),
        ("run", "How it was run", _facts(report)),
    ]
    shown = [(name, head, body) for name, head, body in parts if body]
    links = "".join(f'<li><a href="#{name}">{head}</a></li>' for name, head, _ in shown)
    notes = "".join(f'<p class="warning">{escape(note)}</p>' for note in report.notes)
    return f'{notes}<nav aria-label="Sections"><ul>{links}</ul></nav>' + "".join(
        f'<section id="{name}" aria-labelledby="{name}-head"><h2 id="{name}-head">{head}</h2>{body}</section>'
        for name, head, body in shown
    )


SCORES = "Mean score of each task, from ten samples on with its 95 % bootstrap interval over samples."
TRADE = (
    "Further up is more accurate, further right is faster; bars are 95 % intervals of the score, from ten samples on."
)
DEPTH = "Mean score in per cent by place of the needle: 0 % is the beginning of the context, 100 % its end."
POSITION = "Next-token predictions on the same text, in buckets of positions; lower is closer and better."
SPEED = "Medians; ratios to the baseline within the same round (or sample), above 1 is faster."


def _overview(report: Report) -> str:
    metrics, numbers = report.metrics, report.numbers
    said = "".join(
        f"<li>{charts.swatch(Series(label, numbers[label], ()))}<span><strong>{_breakable(label)}</strong> "
        f"{escape(text)}</span></li>"
        for label, text in sentences(metrics)
    )
    table = tables.headline(metrics)
    badges = {entry["label"]: _badge(entry.get("implementation")) for entry in report.config["attn"]}
    names = {
        label: f"{charts.swatch(Series(label, number, ()))} <span>{_breakable(label)} {badges.get(label, '')}</span>"
        for label, number in numbers.items()
    }
    many = [row for row in metrics["overall"] if not figures.few(row, "pairs")]
    names_of_ends = ("difference_low", "difference_high", "difference")
    reach = max((abs(row[name] or 0) for row in many for name in names_of_ends), default=0)
    rulers = {row["attn"]: _ruler(row, reach) for row in many if row["attn"] not in report.baselines}
    findings = f'<ul class="findings">{said}</ul>' if said else ""
    return f"{findings}{_table(table, 'headline', names, rulers)}<p class=note>{escape(table.note)}</p>"


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
    items = (
        f"<li>{charts.swatch(Series(label, number, ()))}{_breakable(label)}</li>" for label, number in numbers.items()
    )
    return f'<ul class="legend">{"".join(items)}</ul>'


def _charts(made: Sequence[sections.Chart], legend: str, note: str) -> str:
    figures = "".join(
        f"<figure><figcaption>{_breakable(chart.caption)}</figcaption>{chart.svg}"
        f"<details><summary>Data</summary>{_table(chart.data)}</details></figure>"
        for chart in made
    )
    return f'<p class="note">{note}</p>{legend}<div class="charts">{figures}</div>' if made else ""


def _folded(table: Table) -> str:
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    rows = f'<span class="count">{len(table.rows)} rows</span>'
    return f"<details class=folded><summary>{escape(table.title)} {rows}</summary>{note}{_table(table)}</details>"


def _table(
    table: Table, kind: str = "", names: Mapping[str, str] | None = None, rulers: Mapping[str, str] | None = None
) -> str:
    heads = "".join(
        f'<th scope="col"{"" if i < table.words else " class=number"}>{escape(head)}</th>'
        for i, head in enumerate(table.heads)
    )
    body = ""
    for row in table.rows:
        label = row[0]
        body += f'<tr><th scope="row"><div>{(names or {}).get(label, _breakable(label))}</div></th>'
        for index, (head, text) in enumerate(zip(table.heads[1:], row[1:]), 1):
            ruler = (rulers or {}).get(label, "") if head.startswith("difference") else ""
            style = "" if index < table.words else " class=number"
            body += f'<td{style} data-head="{escape(head)}">{ruler}<span>{_breakable(text)}</span></td>'
        body += "</tr>"
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(table.title)}"><table class="{kind}">'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


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
    swatches = "".join(charts.swatch(Series(label, numbers[label], ())) for label in report.samples["attentions"])
    return (HERE / "samples.html").read_text(encoding="utf-8").replace("{{swatches}}", swatches)


def _breakable(text: str) -> str:
    """A label may break before its options."""
    return re.sub(r"([:,/])(?=\w)", r"\1<wbr>", escape(text))
