"""Loss and agreement rows: perplexity from sums of nll, its ratio to the baseline, KL by position."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ...records import Agreement, Loss, Prediction, Sample
from .intervals import exponential, weighted_mean_interval

Row = dict[str, Any]


def loss_rows(
    labels: list[str], baseline: str, samples: Mapping[str, Sample], predictions: Iterable[Loss]
) -> list[Row]:
    """One row per (task, length, attn).

    `perplexity` is exp(sum of nll / number of tokens) over all texts. `ratio` is the perplexity over the baseline's,
    both on the texts that the baseline read too; its interval is a bootstrap over texts.
    """
    rows = []
    for (task, length), found in _cells(samples, predictions).items():
        for label in (label for label in labels if label in found):
            done = _finished(found[label], lambda one: one.nll_sum)
            nll, tokens = math.fsum(one.nll_sum for one in done.values()), sum(one.count for one in done.values())
            row: Row = {"task": task, "length": length, "attn": label, "n": len(done), "tokens": tokens}
            row["nll"] = nll / tokens if tokens else None
            row["perplexity"] = exponential(row["nll"])
            base = _finished(found.get(baseline, {}), lambda one: one.nll_sum)
            row |= _ratio([(one, base[name]) for name, one in done.items() if name in base])
            row["errors"] = sum(one.error is not None for one in found[label].values())
            row["buckets"] = [
                {"begin": begin, "end": end, "count": count, "nll": sums["nll_sum"] / count}
                | {"perplexity": exponential(sums["nll_sum"] / count)}
                for (begin, end), count, sums in _merged(done.values(), ("nll_sum",), weighted=False)
            ]
            rows.append(row)
    return rows


def agreement_rows(labels: list[str], samples: Mapping[str, Sample], predictions: Iterable[Agreement]) -> list[Row]:
    """One row per (task, length, attn); over several texts, means are weighted by positions.

    `kl.median` is the median of the texts' medians, `kl.p99` the weighted mean of their 99th percentiles, `kl.max` the
    largest; `rms_dp` is the root of the weighted mean square.
    """
    rows = []
    for (task, length), found in _cells(samples, predictions).items():
        for label in (label for label in labels if label in found):
            done = list(_finished(found[label], lambda one: one.kl.get("mean")).values())
            errors = sum(one.error is not None for one in found[label].values())
            row = {"task": task, "length": length, "attn": label, "n": len(done), **_agreement(done)}
            plans = list(dict.fromkeys(one.plan for one in done if one.plan))
            rows.append({**row, "errors": errors, "plans": plans, "buckets": _agreement_buckets(done)})
    return rows


def pooled(losses: Sequence[Row], agreements: Sequence[Row]) -> Row:
    """KL, top-1 and perplexity of one attention over all its texts, for the headline table."""
    weights = [row["positions"] for row in agreements]
    row: Row = {
        "kl": _mean([row["kl"]["mean"] for row in agreements], weights),
        "top1": _mean([row["top1"] for row in agreements], weights),
    }
    tokens = [row["tokens"] for row in losses]
    row["perplexity"] = exponential(_mean([row["nll"] for row in losses], tokens))
    logs = [math.log(row["ratio"]) if row["ratio"] else None for row in losses]
    row["perplexity_ratio"] = exponential(_mean(logs, tokens))
    if row["perplexity_ratio"] is None:
        row["perplexity_ratio"] = exponential(_mean([row["log_ppl_ratio"] for row in agreements], weights))
    return row


def _ratio(pairs: list[tuple[Loss, Loss]]) -> Row:
    pairs = [(ours, theirs) for ours, theirs in pairs if ours.count == theirs.count > 0]
    if not pairs:
        return {"ratio": None, "ratio_low": None, "ratio_high": None}
    sums = [float(ours.nll_sum or 0) - float(theirs.nll_sum or 0) for ours, theirs in pairs]
    counts = [ours.count for ours, _ in pairs]
    low, high = weighted_mean_interval(sums, counts)
    ratio = exponential(math.fsum(sums) / sum(counts))
    return {"ratio": ratio, "ratio_low": exponential(low), "ratio_high": exponential(high)}


def _agreement(done: list[Agreement]) -> Row:
    weights = [one.positions for one in done]
    kl = {name: _mean([one.kl.get(name) for one in done], weights) for name in ("mean", "p99")}
    medians = [one.kl["median"] for one in done if "median" in one.kl]
    largest = [one.kl["max"] for one in done if "max" in one.kl]
    kl |= {"median": statistics.median(medians) if medians else None, "max": max(largest, default=None)}
    squares = _mean([one.rms_dp**2 if one.rms_dp is not None else None for one in done], weights)
    log_ratio = _mean([one.log_ppl_ratio for one in done], weights)
    errors = [w * one.log_ppl_ratio_se for one, w in zip(done, weights) if one.log_ppl_ratio_se is not None]
    return {
        "positions": sum(weights),
        "kl": {name: kl[name] for name in ("mean", "median", "p99", "max")},
        "top1": _mean([one.top1 for one in done], weights),
        "rms_dp": None if squares is None else math.sqrt(squares),
        "log_ppl_ratio": log_ratio,
        "log_ppl_ratio_se": math.hypot(*errors) / sum(weights) if errors and sum(weights) else None,
        "perplexity_ratio": exponential(log_ratio),
    }


def _agreement_buckets(done: list[Agreement]) -> list[Row]:
    names = ("kl", "top1", "nll", "baseline_nll")
    return [
        {"begin": begin, "end": end, "count": count, **{name: sums[name] / count for name in names}}
        | {"perplexity": exponential(sums["nll"] / count)}
        | {"baseline_perplexity": exponential(sums["baseline_nll"] / count)}
        for (begin, end), count, sums in _merged(done, names, weighted=True)
    ]


def _cells(samples: Mapping[str, Sample], predictions: Iterable[Any]) -> dict[tuple[str, int], dict[str, dict]]:
    cells: defaultdict[tuple[str, int], dict[str, dict]] = defaultdict(dict)
    for one in predictions:
        sample = samples[one.sample]
        cells[sample.task, sample.length].setdefault(one.attn, {})[one.sample] = one
    return dict(sorted(cells.items()))


def _finished(found: Mapping[str, Any], value: Callable[[Any], float | None]) -> dict[str, Any]:
    """The predictions without an error and with a finite value."""
    numbers = {name: None if one.error is not None else value(one) for name, one in found.items()}
    return {name: one for name, one in found.items() if (x := numbers[name]) is not None and math.isfinite(x)}


def _merged(
    done: Iterable[Prediction], names: tuple[str, ...], *, weighted: bool
) -> list[tuple[tuple[int, int], int, dict[str, float]]]:
    """((begin, end), count, sums) of the texts' buckets; means become sums when `weighted` by their count."""
    merged: dict[tuple[int, int], Row] = {}
    for one in done:
        for bucket in getattr(one, "buckets", []):
            if not bucket["count"]:
                continue
            into = merged.setdefault(
                (int(bucket["begin"]), int(bucket["end"])), {"count": 0, **dict.fromkeys(names, 0.0)}
            )
            into["count"] += int(bucket["count"])
            for name in names:
                into[name] += bucket[name] * (bucket["count"] if weighted else 1)
    return [(place, into["count"], into) for place, into in sorted(merged.items())]


def _mean(values: Sequence[float | None], weights: Sequence[int]) -> float | None:
    pairs = [(value, weight) for value, weight in zip(values, weights) if value is not None and weight]
    total = sum(weight for _, weight in pairs)
    return math.fsum(value * weight for value, weight in pairs) / total if total else None
