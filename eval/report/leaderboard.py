"""Several runs as one: every (run, attention) a row, after a check that the runs asked the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..records import RunFolder, Sample
from .summary.summary import summarise_folder

Row = dict[str, Any]
# What makes two scores comparable; the rest (device, attention, threads) is what a leaderboard compares.
SAME = (
    *("model", "dtype", "baseline", "tasks", "lengths", "samples", "text_samples", "seed", "max_new_tokens"),
    *("text", "haystack", "data", "chat"),
)
LISTS = ("scores", "lengths", "depths", "generation", "loss", "agreement", "speed")


@dataclass(frozen=True)
class Finished:
    """A run folder, read: its name, config, environment, metrics and the digests of its prompts."""

    name: str
    config: Row
    environment: Row
    metrics: Row
    digests: Mapping[str, str]


def read(path: str) -> Finished:
    """Read a run; its metrics are computed from the predictions as they are now.

    Raises:
        ValueError: no run folder, or one without predictions and metrics.
    """
    folder = RunFolder(path)
    environment = folder.read_json("environment") if (folder.path / "environment.json").is_file() else {}
    digests = _digests(folder.samples())
    return Finished(
        folder.path.resolve().name, folder.read_json("config"), environment, summarise_folder(folder), digests
    )


def differences(runs: Sequence[Finished]) -> list[str]:
    """What the runs do not have in common, one text each; empty when their scores can be compared."""
    found = []
    for name in SAME:
        values = {run.name: run.config.get(name) for run in runs}
        if len({repr(value) for value in values.values()}) > 1:
            said = "; ".join(f"{run}: {_listed(value)}" for run, value in values.items())
            found.append(f"{name} ({said})")
    shared = set.intersection(*(set(run.digests) for run in runs))
    unlike = [sample for sample in sorted(shared) if len({run.digests[sample] for run in runs}) > 1]
    if unlike:
        found.append(f"the prompts of {len(unlike)} samples, such as {unlike[0]}")
    return found


def join(runs: Sequence[Finished]) -> tuple[Row, Row]:
    """(config, metrics) of a pretended run with an attention "label (run)" for each; overall rows best score first."""
    overall = [{**row, "attn": _named(run, row["attn"])} for run in runs for row in run.metrics["overall"]]
    overall.sort(key=lambda row: (row["score"] is None, -(row["score"] or 0), row["perplexity_ratio"] or 1))
    metrics: Row = {name: [] for name in LISTS}
    for run in runs:
        for name in LISTS:
            metrics[name] += [{**row, "attn": _named(run, row["attn"])} for row in run.metrics[name]]
    metrics |= {"overall": overall, "errors": sum(run.metrics["errors"] for run in runs)}
    metrics |= {"baseline": "the run's baseline", "baselines": [_named(run, run.metrics["baseline"]) for run in runs]}
    common = {name: runs[0].config.get(name) for name in SAME if _agree(run.config.get(name) for run in runs)}
    attn = [{**entry, "label": _named(run, entry["label"])} for run in runs for entry in run.config["attn"]]
    return {**common, "attn": attn}, metrics


def common_environment(runs: Sequence[Finished]) -> Row:
    """What all runs have in common of hardware, versions and threads; dates and commands are each run's own."""
    names = ("hardware", "versions", "threads", "processes")
    return {n: runs[0].environment.get(n) for n in names if _agree(run.environment.get(n) for run in runs)}


def _named(run: Finished, label: str) -> str:
    return f"{label} ({run.name})"


def _digests(samples: Mapping[str, Sample]) -> dict[str, str]:
    return {name: sample.digest for name, sample in samples.items() if sample.digest}


def _agree(values: Iterable[Any]) -> bool:
    return len({repr(value) for value in values}) == 1


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
