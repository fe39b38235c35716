"""A run's predictions -> metrics.json: scores, generation agreement, loss, agreement and speed, paired per sample.

Everything is a list of flat rows, one per (task, length, attn) or (length, attn); `overall` has one row per attention.
Differences and ratios are to the baseline, on the samples that both finished.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from ...records import Agreement, Generation, Loss, Prediction, RunFolder, Sample
from .answers import Answers
from .intervals import LEVEL, RESAMPLES, SEED
from .likelihood import agreement_rows, loss_rows, pooled
from .speed import headline, speed_rows

Row = dict[str, Any]


def summarise(
    config: Mapping[str, Any], samples: Mapping[str, Sample], predictions: Iterable[Prediction]
) -> dict[str, Any]:
    """The content of metrics.json; numbers that are not finite become None.

    Args:
        config: the run's config.json, of which the labels in `attn` and `baseline` are read.
        samples, predictions: as `RunFolder` reads them; what has no sample or another label is left out.
    """
    labels, baseline = [entry["label"] for entry in config["attn"]], config["baseline"]
    known = [one for one in predictions if one.attn in labels and (one.sample in samples or one.kind == "speed")]
    answers = Answers(labels, baseline, samples, (one for one in known if isinstance(one, Generation)))
    losses = loss_rows(labels, baseline, samples, [one for one in known if isinstance(one, Loss)])
    agreements = agreement_rows(labels, samples, [one for one in known if isinstance(one, Agreement)])
    speed = speed_rows(labels, baseline, samples, known)
    tokens = answers.token_rows()
    bootstrap = {"method": "percentile bootstrap over samples", "level": LEVEL, "resamples": RESAMPLES, "seed": SEED}
    metrics = {
        "baseline": baseline,
        "intervals": bootstrap,
        "overall": [
            {
                "attn": label,
                **_scores(answers, label),
                **_exact_match(_of(label, tokens)),
                **pooled(_of(label, losses), _of(label, agreements)),
                **_at_longest(_of(label, speed)),
                "errors": sum(one.attn == label and one.error is not None for one in known),
                "plans": _plans(label, known),
            }
            for label in labels
        ],
        "scores": answers.score_rows(),
        "lengths": answers.length_rows(),
        "depths": answers.depth_rows(),
        "generation": tokens,
        "loss": losses,
        "agreement": agreements,
        "speed": speed,
        "errors": sum(one.error is not None for one in known),
    }
    return _finite(metrics)


def summarise_folder(folder: RunFolder) -> dict[str, Any]:
    """`summarise` what a run folder holds now; where its predictions were not kept, the metrics.json it has.

    Raises:
        ValueError: the folder is none of an evaluation, or has neither predictions nor metrics.
    """
    config, predictions = folder.read_json("config"), folder.predictions()
    if not predictions:
        if (folder.path / "metrics.json").is_file():
            return folder.read_json("metrics")
        raise ValueError(f"{folder.path} has no predictions yet: run `hf-attn eval --out {folder.path}` first.")
    return summarise(config, folder.samples(), predictions.values())


def _of(label: str, rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["attn"] == label]


def _scores(answers: Answers, label: str) -> Row:
    own, difference, cells = answers.average(label)
    row = {"n": own.n, "cells": cells, **own.as_dict("score"), "pairs": difference.n}
    names = [name for cell in answers.cells.values() for name in cell]
    return {
        **row,
        **difference.as_dict("difference"),
        **answers.counts(label, names),
        **answers.likelihood(label, names),
    }


def _plans(label: str, predictions: Iterable[Prediction]) -> list[str]:
    """What an attention did, in words, each once and in the order in which it was met."""
    return list(dict.fromkeys(one.plan for one in predictions if one.attn == label and one.plan))


def _exact_match(rows: list[Row]) -> Row:
    pairs = sum(row["n"] for row in rows)
    equal = sum(row["n"] * row["exact_match"] for row in rows)
    return {"exact_match": equal / pairs if pairs else None}


def _at_longest(rows: list[Row]) -> Row:
    return headline(max(rows, key=lambda row: row["length"])) if rows else {}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
