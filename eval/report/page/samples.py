"""The samples of a run as report.html's script reads them: prompt end, references and every attention's answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ...records import Generation, Prediction, Sample
from ..summary.answers import first_divergence


def sample_data(
    config: Mapping[str, Any], samples: Mapping[str, Sample], predictions: Iterable[Prediction]
) -> dict[str, Any]:
    """Samples with every attention's answer, for the page's script; empty where nothing was generated.

    An answer is [attention's index, text, score, error, index of the first token unlike the baseline's]. The last is
    None where there is nothing to compare with, and -1 where no token differs: then the text is None as well.
    """
    labels = [entry["label"] for entry in config["attn"]]
    found: dict[str, dict[str, Generation]] = {}
    for one in predictions:
        if isinstance(one, Generation) and one.sample in samples and one.attn in labels:
            found.setdefault(one.sample, {})[one.attn] = one
    rows = []
    for name, answers in found.items():
        sample, base = samples[name], answers.get(config["baseline"])
        row = {"id": name, "task": sample.task, "length": sample.length, "tokens": sample.tokens, "depth": sample.depth}
        row |= {"references": sample.references, "prompt": sample.prompt_tail}
        row["answers"] = [_answer(labels.index(label), answers[label], base) for label in labels if label in answers]
        rows.append(row)
    return {"attentions": labels, "baseline": labels.index(config["baseline"]), "samples": rows} if rows else {}


def _answer(index: int, one: Generation, base: Generation | None) -> list[Any]:
    apart: int | None = None
    if base is not None and one is not base and one.error is None and base.error is None:
        place = first_divergence(one.token_ids, base.token_ids)
        apart = -1 if place is None else place
    return [index, None if apart == -1 else one.prediction, one.score, one.error, apart]
