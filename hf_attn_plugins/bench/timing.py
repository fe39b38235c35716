"""Median times of alternatives that take turns in one run; tables of results with hardware and versions."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hf_attn_plugins.bench.hardware import describe


def rounds(alternatives: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each alternative, round by round: one warm-up call each, then `repeats` rounds with one call each."""
    for run in alternatives.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in alternatives}
    for _ in range(repeats):
        for name, run in alternatives.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def medians(alternatives: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each alternative over `rounds`."""
    return {name: statistics.median(seconds) for name, seconds in rounds(alternatives, repeats).items()}


def spread(base: Sequence[float], own: Sequence[float]) -> str:
    """The smallest and the largest ratio base / own of one round, as "1.20 - 1.31"."""
    ratios = [one / other for one, other in zip(base, own, strict=True)]
    return f"{min(ratios):.2f} - {max(ratios):.2f}"


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write_table(folder: Path, name: str, title: str, rows: Sequence[Mapping[str, Any]], notes: str = "") -> Path:
    """Write rows as `name`.md and `name`.json into `folder`, with hardware and versions.

    Args:
        folder: made if it does not exist.
        name: of the two files, without suffix.
        title: heading of the page.
        rows: one mapping of column -> value per row; all have the same columns.
        notes: a paragraph below the table.

    Returns:
        The path of the Markdown file.

    Raises:
        ValueError: no rows.
    """
    if not rows:
        raise ValueError(f"nothing was measured for {name}: choose at least one case.")
    folder.mkdir(parents=True, exist_ok=True)
    facts = describe()
    (folder / f"{name}.json").write_text(
        json.dumps({"title": title, "hardware": facts, "rows": list(rows)}, indent=1) + "\n", encoding="utf-8"
    )
    page = [f"# {title}", "", hardware_line(facts), "", *markdown_table(rows), ""]
    if notes:
        page += [notes, ""]
    path = folder / f"{name}.md"
    path.write_text("\n".join(page), encoding="utf-8")
    return path


def hardware_line(facts: Mapping[str, Any]) -> str:
    """Hardware and versions, as `describe` gives them, as a sentence."""
    return (
        f"{facts['processor']}, {facts['threads']} threads, "
        f"bfloat16 products: {'yes' if facts['bf16_products'] else 'no'}; "
        f"Python {facts['python']}, torch {facts['torch']}, transformers {facts['transformers']}."
    )


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The lines of a Markdown table; all rows have the same keys, floats get three significant digits."""
    heads = list(rows[0])
    cell = lambda value: f"{value:.3g}" if isinstance(value, float) else str(value)  # noqa: E731
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    return lines + ["| " + " | ".join(cell(row[head]) for head in heads) + " |" for row in rows]
