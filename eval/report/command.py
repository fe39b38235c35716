"""`hf-attn report RUN ...`: one run's tables and page written again, or several runs joined into a leaderboard."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..records import Prediction, RunFolder
from . import leaderboard, tables
from .page import page
from .page.samples import sample_data
from .summary.summary import summarise_folder
from .wording.names import renamed, short_names
from .wording.verdict import verdicts


def run(arguments: argparse.Namespace) -> None:
    """Write and print."""
    if len(arguments.runs) == 1:
        if arguments.out or arguments.allow_different:
            raise ValueError("--out and --allow-different are for several runs: name two or more folders.")
        show(finish(arguments.runs[0]), arguments.runs[0])
    else:
        _join(arguments)


def finish(path: str | Path) -> dict[str, Any]:
    """Write metrics.json, report.md and report.html of a run folder from its predictions; returns the metrics."""
    folder = RunFolder(path)
    config, metrics = folder.read_json("config"), summarise_folder(folder)
    environment = folder.read_json("environment") if (folder.path / "environment.json").is_file() else {}
    samples, predictions = folder.samples(), folder.predictions()
    errors = _errors(predictions)
    title = folder.path.resolve().name
    report = page.Report(
        title, config, environment, metrics, sample_data(config, samples, predictions.values()), errors
    )
    html = page.render(report)
    folder.write_json("metrics", metrics)
    folder.write_text("report.md", tables.markdown(title, config, environment, metrics, errors))
    folder.write_text("report.html", html)
    return metrics


def show(metrics: Mapping[str, Any], path: str | Path) -> None:
    """Print the headline table, where the report lies, and at the end the verdicts."""
    from rich.console import Console

    short = renamed(metrics, short_names(row["attn"] for row in metrics["overall"]))  # whole words in 80 columns
    Console().print(tables.terminal(tables.brief(short)))
    print(f"report: {Path(path) / 'report.html'} (and report.md, metrics.json beside it)")
    for one in verdicts(metrics):
        print(f"{one.attn}: {one.text}.")


def _join(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    runs = [leaderboard.read(path) for path in arguments.runs]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"two runs have the same name among {', '.join(names)}: rename one of the folders.")
    unlike = leaderboard.differences(runs)
    if unlike and not arguments.allow_different:
        raise ValueError(
            f"these runs do not ask the same: they differ in {'; in '.join(unlike)}. Their scores cannot be ranked; "
            "--allow-different joins them and says so."
        )
    notes = [f"These runs do not ask the same, so their rows cannot be ranked: they differ in {'; in '.join(unlike)}."]
    notes = notes if unlike else []
    config, metrics = leaderboard.join(runs)
    title = f"Leaderboard of {len(runs)} runs"
    environment = leaderboard.common_environment(runs)
    folder = RunFolder(arguments.out or os.path.commonpath([Path(path).resolve().parent for path in arguments.runs]))
    html = page.render(page.Report(title, config, environment, metrics, notes=notes))
    text = tables.markdown(title, config, environment, metrics)
    warned = "".join(f"\n> {note}\n" for note in notes)
    folder.write_text("leaderboard.md", text.replace("\n", f"\n{warned}", 1))
    page_path = folder.write_text("leaderboard.html", html)
    for note in notes:
        print(note)
    Console().print(tables.terminal(tables.brief(metrics)))
    print(f"leaderboard: {page_path} (and leaderboard.md beside it)")


def _errors(predictions: Mapping[tuple[str, str], Prediction]) -> list[str]:
    return [f"{one.sample}, {one.attn}: {one.error}" for one in predictions.values() if one.error is not None]
