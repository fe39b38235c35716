"""The seed's demonstration: Scheduler, Workers and Tiler with every number shown, checked against plain softmax.

Written in NumPy with the paper's own formulas (P = exp(Q K^T) without scaling or shift, S its row sums, O = P V), so
that it can be followed by hand, and does not lean on the code that it explains.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_attn_plugins.cqs.scheduler import Plan

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class LocalResult:
    """What one worker of the demonstration computes: P (L, L) with banned pairs zeroed, S (L,) and O (L, d)."""

    scores: Array
    sums: Array
    outputs: Array


@dataclass(frozen=True)
class Demonstration:
    """All numbers of one run.

    Attributes:
        query, key, value: (N, d) in [0, 1).
        workers: one result per worker.
        outputs, sums: the Tiler's O (N, d) and S (N,).
    """

    query: Array
    key: Array
    value: Array
    workers: list[LocalResult]
    outputs: Array
    sums: Array

    @property
    def attention(self) -> Array:
        """O / S: the result."""
        return self.outputs / self.sums[:, None]

    def is_correct(self) -> bool:
        """Whether the result equals softmax(Q K^T) V, computed in one piece."""
        scores = self.query @ self.key.T
        weights = np.exp(scores - scores.max(1, keepdims=True)) if scores.size else scores
        expected = (weights / weights.sum(1, keepdims=True)) @ self.value
        return bool(np.allclose(expected, self.attention))


def demonstrate(plan: Plan, head_dim: int = 5, seed: int = 0) -> Demonstration:
    """Run the plan on random queries, keys and values of `head_dim` numbers; memory grows with N^2."""
    generator = np.random.default_rng(seed)
    query, key, value = (generator.random((plan.num_tokens, head_dim)) for _ in range(3))
    outputs, sums = np.zeros_like(value), np.zeros(plan.num_tokens)
    workers = []
    for worker, material in enumerate(plan.material):
        scores = np.exp(query[material] @ key[material].T)
        for a, b in plan.local_bans(worker):
            scores[a, b] = 0
        local = LocalResult(scores, scores.sum(1), scores @ value[material])
        outputs[material] += local.outputs
        sums[material] += local.sums
        workers.append(local)
    return Demonstration(query, key, value, workers, outputs, sums)


def memory_summary(plan: Plan) -> dict[str, float]:
    """Lengths of the workers' material, as numbers and as shares of N."""
    lengths, total = plan.lengths, max(1, plan.num_tokens)
    return {
        "expected_ratio": len(plan.interest_set) / plan.num_workers,
        "longest": max(lengths),
        "longest_ratio": max(lengths) / total,
        "shortest": min(lengths),
        "shortest_ratio": min(lengths) / total,
        "average": statistics.mean(lengths),
        "average_ratio": statistics.mean(lengths) / total,
        "standard_deviation": statistics.stdev(lengths) if len(lengths) > 1 else 0.0,
    }
