"""The Tiler: merges the workers' partial results, each worker once, in any order of arrival."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from torch import Tensor

from hf_attn_plugins.core.partial import Partial, merge
from hf_attn_plugins.cqs.planning.worker_share import Leaf
from hf_attn_plugins.cqs.tokens import TOKENS
from hf_attn_plugins.cqs.workers import WorkerResult


class Ledger:
    """Which workers of a plan have reported.

    Args:
        leaves: all leaves of a plan.
    """

    def __init__(self, leaves: Iterable[Leaf]) -> None:
        self._names = {leaf.path: leaf.name for leaf in leaves}
        self._done: set[tuple[int, ...]] = set()

    def admit(self, path: tuple[int, ...]) -> bool:
        """Note a worker's report. False when it had reported before: its result must not be counted again.

        Raises:
            ValueError: the plan has no such worker.
        """
        if path not in self._names:
            raise ValueError(f"a result of worker {'.'.join(map(str, path))} came in, which the plan does not have.")
        if path in self._done:
            return False
        self._done.add(path)
        return True

    @property
    def missing(self) -> list[str]:
        """Names of the workers that have not reported."""
        return [name for path, name in self._names.items() if path not in self._done]

    def require_all(self) -> None:
        """Check that every worker has reported.

        Raises:
            ValueError: workers are missing; the message names them.
        """
        missing = self.missing
        if missing:
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            raise ValueError(f"no result from {', '.join(missing[:8])}{more}: run them (again) and add their results.")


class Tiler:
    """Collects worker results and merges them by their log-sum-exp; differentiable.

    Args:
        leaves: all leaves of the plan.
        query: (B, Hq, N, D), read for its shape, dtype and device only.
        head_dim_v: Dv, elements of a value.
    """

    def __init__(self, leaves: Iterable[Leaf], query: Tensor, head_dim_v: int) -> None:
        self._ledger = Ledger(leaves)
        self._query, self._head_dim_v = query, head_dim_v
        self._results: dict[tuple[int, ...], WorkerResult] = {}

    def add(self, result: WorkerResult) -> bool:
        """Take a worker's result. False, and nothing changes, when this worker's result was added before.

        Raises:
            ValueError: the plan has no such worker.
        """
        new = self._ledger.admit(result.path)
        if new:
            self._results[result.path] = result
        return new

    @property
    def missing(self) -> list[str]:
        """Names of the workers whose results have not been added."""
        return self._ledger.missing

    def result(self) -> Partial:
        """Attention of all N rows, bit for bit the same for every order of arrival.

        Returns:
            `Partial`: out (B, Hq, N, Dv) in the query's dtype, lse (B, Hq, N) in float32 (float64 for float64).

        Raises:
            ValueError: results are missing; the message names the workers.
        """
        self._ledger.require_all()
        ordered = [result for _, result in sorted(self._results.items())]
        num_tokens = self._query.shape[TOKENS]
        ends = {end for result in ordered for rows in result.rows for end in rows}
        cuts = sorted(ends | {0, num_tokens})
        index = {position: i for i, position in enumerate(cuts)}
        pieces: list[list[Partial]] = [[] for _ in cuts[1:]]
        for result in ordered:
            for (begin, end), partial in zip(result.rows, result.partials, strict=True):
                first, last = index[begin], index[end]
                for i, piece in enumerate(_split(partial, cuts[first : last + 1]), first):
                    pieces[i].append(piece)
        merged = [merge(p) if p else self._empty(b - a) for p, (a, b) in zip(pieces, itertools.pairwise(cuts))]
        if not merged:
            return self._empty(0)
        return Partial.cat(merged)

    def _empty(self, rows: int) -> Partial:
        return Partial.empty(self._query[:, :, :rows], self._head_dim_v)


def _split(partial: Partial, cuts: list[int]) -> list[Partial]:
    if len(cuts) == 2:
        return [partial]
    return [partial.rows(low - cuts[0], high - cuts[0]) for low, high in itertools.pairwise(cuts)]
