"""Short names of attentions for charts and tables: the method, and of its options only those that tell two apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

ROWS = ("overall", "scores", "lengths", "depths", "generation", "loss", "agreement", "speed")


def short_names(labels: Iterable[str]) -> dict[str, str]:
    """Label -> short name: "star_attention:block_size=512" -> "star", or "star block 512" beside another star.

    A leaderboard's labels keep their run: "tiled_attention (A)" -> "tiled (A)".
    """
    labels = list(labels)
    parsed = {label: _parsed(label) for label in labels}
    names = {}
    for label, (base, options, run) in parsed.items():
        alike = [theirs for b, theirs, r in parsed.values() if (b, r) == (base, run)]
        differing = [name for name in options if len({theirs.get(name) for theirs in alike}) > 1]
        words = ", ".join(f"{name.removesuffix('_size').replace('_', ' ')} {options[name]}" for name in differing)
        names[label] = f"{base} {words}".rstrip() + run
    taken = list(names.values())
    return {label: name if taken.count(name) == 1 else label for label, name in names.items()}


def renamed(metrics: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The metrics with other names of their attentions."""
    made = dict(metrics)
    for name in ROWS:
        made[name] = [{**row, "attn": names.get(row["attn"], row["attn"])} for row in metrics[name]]
    made["baseline"] = names.get(metrics["baseline"], metrics["baseline"])
    if "baselines" in metrics:
        made["baselines"] = [names.get(label, label) for label in metrics["baselines"]]
    return made


def _parsed(label: str) -> tuple[str, dict[str, str], str]:
    """(method, options, run of a leaderboard with its space and brackets)."""
    found = re.fullmatch(r"(.*?)( \([^()]*\))?", label, re.DOTALL)
    core, run = (found[1], found[2] or "") if found else (label, "")
    method, _, rest = core.partition(":")
    options = dict(word.partition("=")[::2] for word in rest.split(",") if "=" in word)
    return method.removesuffix("_attention") or method, options, run
