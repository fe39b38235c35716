"""Means with their uncertainty: standard errors, bootstrap intervals over samples, ratios of sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
SEED = 20240917
LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over n values, its standard error and the ends of its interval; None where n does not allow it."""

    n: int
    mean: float | None
    se: float | None = None
    low: float | None = None
    high: float | None = None

    def as_dict(self, name: str = "") -> dict[str, float | None]:
        """mean, se, low, high; with a name: name, name_se, name_low, name_high."""
        head = name or "mean"
        tail = f"{name}_" if name else ""
        return {head: self.mean, f"{tail}se": self.se, f"{tail}low": self.low, f"{tail}high": self.high}


def estimate(*groups: Sequence[float]) -> Estimate:
    """The mean of the groups' means: every group (a task at a length) counts alike, whatever its size.

    The standard error comes from the sample variances (n - 1), the interval from a percentile bootstrap that draws
    again within each group, with a fixed seed. Both need two values in every group. Empty groups are left out.
    """
    filled = [np.asarray(group, dtype=np.float64) for group in groups if len(group)]
    n = sum(len(group) for group in filled)
    if not filled:
        return Estimate(0, None)
    mean = math.fsum(float(group.mean()) for group in filled) / len(filled)
    if min(len(group) for group in filled) < 2:
        return Estimate(n, mean)
    se = math.sqrt(math.fsum(float(group.var(ddof=1)) / len(group) for group in filled)) / len(filled)
    random = np.random.default_rng(SEED)
    drawn = np.mean([_redrawn_means(group, random) for group in filled], axis=0)
    return Estimate(n, mean, se, *_ends(drawn))


def weighted_mean_interval(sums: Sequence[float], counts: Sequence[int]) -> tuple[float | None, float | None]:
    """Bootstrap interval of sum(sums) / sum(counts), drawing whole texts again; (None, None) below two texts."""
    if len(sums) < 2:
        return None, None
    drawn = np.random.default_rng(SEED).multinomial(len(sums), [1 / len(sums)] * len(sums), size=RESAMPLES)
    return _ends((drawn @ np.asarray(sums, dtype=np.float64)) / (drawn @ np.asarray(counts, dtype=np.float64)))


def exponential(value: float | None) -> float | None:
    """exp(value), or None where there is no value or no finite result."""
    return math.exp(value) if value is not None and value < 700 else None


def _redrawn_means(values: np.ndarray, random: np.random.Generator) -> np.ndarray:
    # How often each distinct value is drawn is multinomial: scores are few distinct numbers, so this stays small.
    distinct, counts = np.unique(values, return_counts=True)
    return random.multinomial(len(values), counts / len(values), size=RESAMPLES) @ distinct / len(values)


def _ends(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)
