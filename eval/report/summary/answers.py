"""Generated answers of a run, by task, length and attention: scores, differences, needle depths, token agreement."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from ...records import Generation, Sample
from .intervals import Estimate, estimate

Row = dict[str, Any]
GRID, PARTS = 11, 5  # needle depths: as they are when on a grid of so many, else in so many parts


class Answers:
    """The generations of one run.

    Attributes:
        cells: the names of the samples of each (task, length).
        generations, scores: by attention, then by sample; scores hold only what was answered and scored.
    """

    def __init__(
        self, labels: list[str], baseline: str, samples: Mapping[str, Sample], generations: Iterable[Generation]
    ) -> None:
        self.labels, self.baseline, self.samples = labels, baseline, samples
        self.generations: dict[str, dict[str, Generation]] = {label: {} for label in labels}
        cells: defaultdict[tuple[str, int], set[str]] = defaultdict(set)
        for one in generations:
            self.generations[one.attn][one.sample] = one
            cells[samples[one.sample].task, samples[one.sample].length].add(one.sample)
        self.cells = {cell: sorted(names) for cell, names in sorted(cells.items())}
        self.scores = {label: _scores(found.values()) for label, found in self.generations.items()}

    def score_rows(self) -> list[Row]:
        """One row per (task, length, attn): mean score and its paired difference to the baseline."""
        rows = []
        for (task, length), names in self.cells.items():
            for label in self.labels:
                own, difference = estimate(self._scored(label, names)), estimate(self._differences(label, names))
                errors = sum(one.error is not None for one in self._of(label, names))
                row = {"task": task, "length": length, "attn": label, "n": own.n, **own.as_dict()}
                row |= {"pairs": difference.n, **difference.as_dict("difference"), "errors": errors}
                row |= {**self.counts(label, names), **self.likelihood(label, names)}
                if own.n or errors:
                    rows.append(row)
        return rows

    def counts(self, label: str, names: Iterable[str]) -> Row:
        """`total`, the sum of the scores, and `changed`, how many of the paired scores are not the baseline's."""
        names = list(names)
        changed = sum(difference != 0 for difference in self._differences(label, names))
        return {"total": math.fsum(self._scored(label, names)), "changed": changed}

    def likelihood(self, label: str, names: Iterable[str]) -> Row:
        """How likely the reference answers are, on the samples that were measured under the baseline too.

        answer_pairs: how many samples these are.
        answer_nll: nats per token of their reference answers.
        answer_difference: nats per token less the baseline's, the mean over samples, with its interval where there are
        enough. Above 0, the references are less likely than under the baseline.
        """
        ours, theirs = self.generations[label], self.generations.get(self.baseline, {})
        both = [name for name in names if _has_nll(ours.get(name)) and _has_nll(theirs.get(name))]
        pairs = [(ours[name], theirs[name]) for name in both]
        tokens = sum(one.reference_tokens for one, _ in pairs)
        found = estimate([(one.reference_nll - base.reference_nll) / one.reference_tokens for one, base in pairs])  # type: ignore[operator]
        nll = math.fsum(one.reference_nll for one, _ in pairs) / tokens if tokens else None  # type: ignore[misc]
        return {"answer_pairs": len(pairs), "answer_nll": nll, **found.as_dict("answer_difference")}

    def average(self, label: str, length: int | None = None) -> tuple[Estimate, Estimate, int]:
        """Score and difference over all tasks (of a length), every cell counting alike, and the number of cells."""
        here = [names for cell, names in self.cells.items() if length in (None, cell[1])]
        own = [self._scored(label, names) for names in here]
        return estimate(*own), estimate(*(self._differences(label, names) for names in here)), sum(map(bool, own))

    def length_rows(self) -> list[Row]:
        """One row per (length, attn): the average over tasks."""
        rows = []
        for length in sorted({length for _, length in self.cells}):
            for label in self.labels:
                own, difference, tasks = self.average(label, length)
                row = {"length": length, "attn": label, "tasks": tasks, "n": own.n, **own.as_dict()}
                if own.n:
                    rows.append({**row, **difference.as_dict("difference")})
        return rows

    def depth_rows(self) -> list[Row]:
        """Mean score by length and needle depth, over all tasks that hide a needle.

        Depths on a common grid stay as they are (begin == end); others are gathered in fifths of the context.
        """
        depths = {name: sample.depth for name, sample in self.samples.items() if sample.depth is not None}
        grid = len(set(depths.values())) <= GRID and all(_is_round(depth) for depth in depths.values())
        found: defaultdict[tuple[int, float, float, str], list[float]] = defaultdict(list)
        for label in self.labels:
            for name, depth in depths.items():
                if name in self.scores[label]:
                    part = min(int(depth * PARTS), PARTS - 1)
                    begin, end = (depth, depth) if grid else (part / PARTS, (part + 1) / PARTS)
                    found[self.samples[name].length, begin, end, label].append(self.scores[label][name])
        return [
            {"length": length, "begin": begin, "end": end, "attn": label, "n": len(values)}
            | {"mean": statistics.fmean(values)}
            for (length, begin, end, label), values in sorted(found.items())
        ]

    def token_rows(self) -> list[Row]:
        """One row per (task, length, attn): share of answers equal token by token; where the others first differ."""
        rows = []
        for (task, length), names in self.cells.items():
            for label in self.labels:
                both = [name for name in names if self._finished(label, name) and self._finished(self.baseline, name)]
                if label == self.baseline or not both:
                    continue
                ours, theirs = self.generations[label], self.generations[self.baseline]
                places = [first_divergence(ours[name].token_ids, theirs[name].token_ids) for name in both]
                apart = [place for place in places if place is not None]
                row = {"task": task, "length": length, "attn": label, "n": len(both)}
                row["exact_match"] = 1 - len(apart) / len(both)
                row["first_divergence_median"] = statistics.median(apart) if apart else None
                rows.append(row)
        return rows

    def _of(self, label: str, names: list[str]) -> list[Generation]:
        return [self.generations[label][name] for name in names if name in self.generations[label]]

    def _scored(self, label: str, names: list[str]) -> list[float]:
        return [self.scores[label][name] for name in names if name in self.scores[label]]

    def _differences(self, label: str, names: list[str]) -> list[float]:
        ours, theirs = self.scores[label], self.scores.get(self.baseline, {})
        return [ours[name] - theirs[name] for name in names if name in ours and name in theirs]

    def _finished(self, label: str, name: str) -> bool:
        one = self.generations.get(label, {}).get(name)
        return one is not None and one.error is None


def first_divergence(ours: list[int], theirs: list[int]) -> int | None:
    """Index of the first token in which two answers differ; None where they are equal.

    Where one answer is the beginning of the other, it is the length of the shorter one.
    """
    for index, (a, b) in enumerate(zip(ours, theirs)):
        if a != b:
            return index
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def _has_nll(one: Generation | None) -> bool:
    return (
        one is not None
        and one.error is None
        and one.reference_tokens > 0
        and one.reference_nll is not None
        and math.isfinite(one.reference_nll)
    )


def _is_round(depth: float) -> bool:
    return abs(depth * 20 - round(depth * 20)) < 1e-6


def _scores(generations: Iterable[Generation]) -> dict[str, float]:
    return {
        one.sample: one.score
        for one in generations
        if one.error is None and one.score is not None and math.isfinite(one.score)
    }
