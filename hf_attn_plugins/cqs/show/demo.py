"""The paper's demonstration: Scheduler, Workers and Tiler with every number shown, checked against plain softmax.

The formulas are the paper's: P = exp(Q K^T) without scaling or shift, S = row sums of P, O = P V. They are written in
NumPy and can be followed by hand. Only the plan is shared with the rest of the package.

Source: CQS-Attention, IEEE Access 13 (2025) 35527.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np

from hf_attn_plugins.cqs.planning.scheduler import Plan

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class LocalResult:
    """What one worker of the demonstration computes from its L tokens.

    Attributes:
        scores: P (L, L), 0 for the pairs that the worker must not compute.
        sums: S (L,).
        outputs: O (L, d).
    """

    scores: Array
    sums: Array
    outputs: Array


@dataclass(frozen=True)
class Demonstration:
    """All numbers of one run.

    Attributes:
        query, key, value: (N, d), float64 in [0, 1).
        workers: one result per worker, worker 0 first.
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
        """The result O / S, (N, d)."""
        return self.outputs / self.sums[:, None]

    def is_correct(self) -> bool:
        """Whether `attention` equals softmax(Q K^T) V of all tokens at once, up to rounding (`numpy.allclose`)."""
        scores = self.query @ self.key.T
        weights = np.exp(scores - scores.max(1, keepdims=True)) if scores.size else scores
        expected = (weights / weights.sum(1, keepdims=True)) @ self.value
        return bool(np.allclose(expected, self.attention))


def demonstrate(plan: Plan, head_dim: int = 5, seed: int = 0) -> Demonstration:
    """Run the first level of `plan` on random Q, K and V (N, `head_dim`); memory grows with N^2."""
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
    """Longest, shortest and average number of a worker's tokens: in tokens, and as ratios to N."""
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
