"""A run's metrics as tables: for the terminal, for report.md, and as rows for report.html."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .wording import figures
from .wording.verdict import verdicts

if TYPE_CHECKING:
    from rich.table import Table as RichTable

Row = Mapping[str, Any]
Column = tuple[str, Callable[[Row], str]]
LISTED_ERRORS = 20
BASELINE, OVERVIEW = "baseline", "Overview"


@dataclass(frozen=True)
class Table:
    """Heads and rows of text; the first `words` columns name the row, all others hold numbers."""

    title: str
    heads: list[str]
    rows: list[list[str]]
    note: str = ""
    words: int = 1


def brief(metrics: Row) -> Table:
    """The headline in 80 columns, for the terminal."""
    columns: list[Column] = [
        ("attention", lambda row: row["attn"]),
        ("score,\n%", lambda row: figures.score(row, "score").split(" ±")[0]),
        ("difference", _paired(metrics)),
        ("answer\nnats", lambda row: _signed_answer(row, metrics)),
        ("KL,\nnats", lambda row: figures.nats(row["kl"])),
        ("ppl\nratio", lambda row: figures.fine_ratio(row["perplexity_ratio"])),
        ("prefill", lambda row: figures.ratio(row.get("speed_up")) + _noise(row)),
        ("peak\nmemory", lambda row: figures.ratio(row.get("memory_ratio"))),
        ("errors", lambda row: str(row["errors"] or figures.NOTHING)),
    ]
    note = (
        "Differences are paired: in points with 95 % intervals, counts below ten; answer: nats by which a token "
        "of the reference is less likely; prefill: times as fast, ~ within noise; memory: of the baseline's."
    )
    return _table(f"Against {metrics['baseline']}", columns, metrics["overall"], note)


def headline(metrics: Row) -> Table:
    """One row per attention: score, difference, agreement, speed-up, memory; columns without a number are left out."""
    rows = metrics["overall"]
    lengths = sorted({row["speed_length"] for row in rows if row.get("speed_length")})
    at = f" at {lengths[-1]:,}" if lengths else ""
    paired = _paired(metrics)
    columns: list[Column] = [
        ("attention", lambda row: row["attn"]),
        ("score, %", lambda row: figures.score(row, "score")),
        (f"difference to {metrics['baseline']}", paired),
        ("same answers, %", lambda row: figures.percent(row["exact_match"])),
        ("reference less likely, nats/token", lambda row: _answer_difference(row, metrics)),
        ("KL, nats", lambda row: figures.nats(row["kl"])),
        ("perplexity", lambda row: figures.perplexity(row["perplexity"])),
        ("perplexity ratio", lambda row: figures.fine_ratio(row["perplexity_ratio"])),
        (f"prefill speed-up{at}", figures.speed),
        ("decode speed-up", lambda row: figures.speed(row, "decode_speed_up")),
        ("peak memory", figures.memory),
        ("errors", lambda row: str(row["errors"] or figures.NOTHING)),
    ]
    sources = {row["speed_source"] for row in rows if row.get("speed_source")}
    timed = "" if sources <= {"speed"} else " Seconds are those of the answers themselves, not of repeated rounds."
    note = (
        "Score: mean over tasks and lengths ± standard error. Difference: paired per sample, in points, with its 95 % "
        "bootstrap interval (one of no width: every pair gave the same); below ten samples both are counts. Reference: "
        "by how much the right answer is less likely than under the baseline. Ratios are to the baseline; a speed-up "
        f"above 1 is faster.{timed}"
    )
    return _table(OVERVIEW, columns, rows, note)


def ran(metrics: Row) -> list[tuple[str, list[str]]]:
    """(attention, the different plans that ran) for every attention of which it was recorded."""
    return [(row["attn"], list(row["plans"])) for row in metrics["overall"] if row.get("plans")]


def details(metrics: Row) -> list[Table]:
    """Scores by task and length, then agreement, perplexity and speed, as far as the run has them."""
    where: list[Column] = [
        ("task", lambda row: row["task"]),
        ("length", lambda row: f"{row['length']:,}"),
        ("attention", lambda row: row["attn"]),
    ]
    answers: list[Column] = [
        *where,
        ("n", lambda row: str(row["n"])),
        ("score, %", figures.score),
        (f"difference to {metrics['baseline']}", _paired(metrics)),
        ("same answers, %", lambda row: figures.percent(row.get("exact_match"))),
        ("reference, nats/token", lambda row: figures.nats(row.get("answer_nll"))),
        ("less likely by", lambda row: _answer_difference(row, metrics)),
        ("first differing token", lambda row: _number(row.get("first_divergence_median"))),
        ("errors", lambda row: str(row["errors"] or figures.NOTHING)),
    ]
    agreement: list[Column] = [
        *where,
        ("KL, mean", lambda row: figures.nats(row["kl"]["mean"])),
        ("median", lambda row: figures.nats(row["kl"]["median"])),
        ("99 %", lambda row: figures.nats(row["kl"]["p99"])),
        ("max", lambda row: figures.nats(row["kl"]["max"])),
        ("same first choice, %", lambda row: figures.percent(row["top1"])),
        ("RMS Δp", lambda row: figures.nats(row["rms_dp"])),
        ("ln perplexity ratio", _log_ratio),
    ]
    loss: list[Column] = [
        *where,
        ("texts", lambda row: str(row["n"])),
        ("tokens", lambda row: f"{row['tokens']:,}"),
        ("perplexity", lambda row: figures.perplexity(row["perplexity"])),
        ("ratio", _ratio_with_interval),
    ]
    speed: list[Column] = [
        ("length", lambda row: f"{row['length']:,}"),
        ("attention", lambda row: row["attn"]),
        ("n", lambda row: str(row["n"])),
        ("prefill", lambda row: figures.seconds(row["prefill"])),
        ("speed-up", figures.speed),
        ("first token", lambda row: figures.seconds(row["first_token"])),
        ("decode, per token", lambda row: figures.seconds(row["decode_per_token"])),
        ("decode speed-up", lambda row: figures.speed(row, "decode_speed_up")),
        ("peak memory", figures.memory),
    ]
    tokens = {(row["task"], row["length"], row["attn"]): row for row in metrics["generation"]}
    scores = [tokens.get((row["task"], row["length"], row["attn"]), {}) | row for row in metrics["scores"]]
    tables = (
        _table("Scores", answers, scores, "", 3),
        _table("Agreement with the baseline", agreement, metrics["agreement"], "KL in nats per position.", 3),
        _table("Perplexity", loss, metrics["loss"], "Ratio: on the texts both read; 95 % bootstrap interval.", 3),
        _table("Speed and memory", speed, metrics["speed"], "Medians; ratios within the same round (or sample).", 2),
    )
    return [table for table in tables if table.rows]


def facts(config: Row, environment: Row) -> list[tuple[str, str]]:
    """What was run, on what and when, as (name, text); unknown ones are left out."""
    hardware = environment.get("hardware") or {}
    versions = {"python": hardware.get("python"), **(environment.get("versions") or {})}
    threads = environment.get("threads") or hardware.get("threads")
    processes = environment.get("processes") or 1
    command = [str(word) for word in environment.get("command") or []]
    command[:1] = [Path(word).name for word in command[:1]]  # where the program lies is nobody's business
    found = {
        "model": config.get("model"),
        "dtype": config.get("dtype"),
        "attention": ", ".join(entry["label"] for entry in config["attn"]),
        "tasks": ", ".join(map(str, config.get("tasks") or [])),
        "lengths": ", ".join(f"{length:,}" for length in config.get("lengths") or []),
        "samples": config.get("samples"),
        "seed": config.get("seed"),
        "hardware": hardware.get("processor"),
        "threads": f"{threads}" + (f" in each of {processes} processes" if processes > 1 else "") if threads else None,
        "versions": ", ".join(
            f"{name} {text}" for name, text in versions.items() if text not in (None, "not installed")
        ),
        "date": str(environment.get("date") or "")[:16].replace("T", " "),
        "command": shlex.join(command),
    }
    return [(name, str(text)) for name, text in found.items() if text not in (None, "")]


def markdown(title: str, config: Row, environment: Row, metrics: Row, errors: Sequence[str] = ()) -> str:
    """report.md: what was run, the verdicts, the headline, every table, the first errors."""
    page = [f"# {title}", "", *(f"- {name}: {_plain(text)}" for name, text in facts(config, environment))]
    said = [f"- **{_plain(one.attn)}**: {_plain(one.text)}." for one in verdicts(metrics)]
    page += ["", "## Verdicts", "", *said] if said else []
    for table in (headline(metrics), *details(metrics)):
        page += ["", f"## {table.title}", "", *markdown_lines(table)]
        page += ["", table.note] if table.note else []
        if table.title == OVERVIEW and ran(metrics):
            page += [
                "",
                "What ran:",
                "",
                *(f"- {_plain(name)}: {_plain('; '.join(plans))}" for name, plans in ran(metrics)),
            ]
    if errors:
        page += ["", f"## {figures.count(metrics['errors'], 'error')}", ""]
        page += [f"- {_plain(text)}" for text in errors[:LISTED_ERRORS]]
    return "\n".join(page) + "\n"


def markdown_lines(table: Table) -> list[str]:
    """The lines of a Markdown table, numbers to the right."""
    rule = "|" + "|".join("---" if i < table.words else "---:" for i in range(len(table.heads))) + "|"
    return ["| " + " | ".join(map(_plain, row)) + " |" if row else rule for row in (table.heads, [], *table.rows)]


def terminal(table: Table) -> RichTable:
    """The same table for a terminal."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table as RichTable

    shown = RichTable(title=escape(table.title), caption=escape(table.note) or None, box=SIMPLE_HEAD, padding=0)
    for index, head in enumerate(table.heads):
        words = index < table.words
        shown.add_column(escape(head), justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for row in table.rows:
        shown.add_row(*map(escape, row))
    return shown


def _table(title: str, columns: Iterable[Column], rows: Sequence[Row], note: str = "", words: int = 1) -> Table:
    filled = []
    for head, cell in columns:
        cells = [cell(row) for row in rows]
        if any(text not in ("", figures.NOTHING, BASELINE) for text in cells):
            filled.append((head, cells))
    heads = [head for head, _ in filled]
    return Table(title, heads, [list(row) for row in zip(*(cells for _, cells in filled))], note, words)


def _paired(metrics: Row) -> Callable[[Row], str]:
    """The difference, but "baseline" where the row is the baseline itself."""
    baselines = metrics.get("baselines", [metrics["baseline"]])
    return lambda row: BASELINE if row["attn"] in baselines else figures.difference(row)


def _answer_difference(row: Row, metrics: Row) -> str:
    baselines = metrics.get("baselines", [metrics["baseline"]])
    if row["attn"] in baselines:
        return figures.NOTHING if row.get("answer_nll") is None else BASELINE
    return figures.answer_difference(row)


def _signed_answer(row: Row, metrics: Row) -> str:
    """Without its interval, and without a word for the baseline: the terminal is narrow."""
    text = _answer_difference(row, metrics)
    return figures.NOTHING if text == BASELINE else text.split(" [")[0]


def _noise(row: Row) -> str:
    """The mark ~ where the rounds do not tell which is faster."""
    return " ~" if row.get("speed_up_low") is not None and figures.within_noise(row) and row["speed_up"] != 1 else ""


def _number(value: float | None) -> str:
    return figures.NOTHING if value is None else f"{value:g}"


def _log_ratio(row: Row) -> str:
    value, error = row["log_ppl_ratio"], row["log_ppl_ratio_se"]
    if value is None:
        return figures.NOTHING
    text = "0" if value == 0 else f"{value:+.4f}".replace("-", figures.MINUS)
    return text + ("" if error is None else f" ± {error:.4f}")


def _ratio_with_interval(row: Row) -> str:
    text = figures.fine_ratio(row["ratio"])
    if row["ratio_low"] is None or figures.few(row):
        return text
    return f"{text} [{figures.fine_ratio(row['ratio_low'])}, {figures.fine_ratio(row['ratio_high'])}]"


def _plain(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
