"""Times of indexed attention and of the direct form, measured in turns: per stage, and for many sizes."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.bench.hardware import describe
from hf_attn_plugins.bench.timing import spread
from hf_attn_plugins.commands.bench.arguments import PUBLISHED
from hf_attn_plugins.indexed.attention import (
    column_weights,
    indexed_attention,
    indexed_scores,
    indexed_values,
    pooled_values,
)
from hf_attn_plugins.indexed.direct import direct_attention, direct_scores, project_direct, project_indexed
from hf_attn_plugins.indexed.plan import CallSizes, direct_cost, table_cost
from hf_attn_plugins.indexed.tables import Projections, build_tables, project_tables, sinusoids

PUBLISHED_SIZES = CallSizes(**PUBLISHED)
MOST_CALLS = 100  # of one function in a turn
SWEEPS = {
    "words": (1, 2, 5, 20, 100, 500, 2000),
    "characters": (16, 64, 256, 1024, 4096, 8192),
    "length": (4, 8, 16, 32, 64, 128),
    "width": (32, 64, 128, 256, 512, 1024),
}


@dataclass(frozen=True)
class Timing:
    """One stage, timed.

    Attributes:
        name: the stage.
        direct, tables: median seconds of the direct form and of the table form.
        spread: the smallest and the largest ratio of one turn.
        error: the largest absolute difference between the two results.
    """

    name: str
    direct: float
    tables: float
    spread: str
    error: float

    @property
    def ratio(self) -> float:
        """direct / tables: above 1 the tables are faster."""
        return self.direct / self.tables


def interleaved(functions: list[Callable[[], Any]], repeats: int) -> list[list[float]]:
    """Seconds of each function, turn by turn. They take turns, so that a machine that slows down slows all of them.

    In a turn each function runs for about as long as one call of the slowest takes, in at most `MOST_CALLS` calls. The
    first calls after another function are slower, since caches and fresh memory are the other's.

    Args:
        functions: what to time.
        repeats: turns.
    """
    for function in functions:
        function()
    once = [_seconds(function, 1) for function in functions]
    batch = [min(MOST_CALLS, max(1, round(max(once) / one))) for one in once]
    seconds: list[list[float]] = [[] for _ in functions]
    for _ in range(repeats):
        for function, count, record in zip(functions, batch, seconds, strict=True):
            record.append(_seconds(function, count))
    return seconds


def _seconds(function: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        function()
    return (time.perf_counter() - start) / count


@dataclass(frozen=True)
class Inputs:
    """Random character table (n, d), positions (L, d), words (W, L) and weights; positions use the same weights."""

    characters: Tensor
    positions: Tensor
    indices: Tensor
    weights: Projections

    @classmethod
    def draw(cls, sizes: CallSizes, seed: int = 0) -> Inputs:
        """float32 normal characters, sinusoids, weights as nn.Linear draws them, uniform words without padding."""
        generator = torch.Generator().manual_seed(seed)
        columns, bound = sizes.heads * sizes.dim, sizes.width**-0.5

        def weight() -> Tensor:
            return (torch.rand(columns, sizes.width, generator=generator) * 2 - 1) * bound

        return cls(
            torch.randn(sizes.characters, sizes.width, generator=generator),
            sinusoids(sizes.length, sizes.width),
            torch.randint(0, sizes.characters, (sizes.words, sizes.length), generator=generator),
            Projections(weight(), weight(), weight()),
        )


def stages(sizes: CallSizes) -> Iterator[tuple[str, Callable[[], Tensor], Callable[[], Tensor]]]:
    """(name, direct form, table form) of every stage and of the whole call.

    Each call builds its tables, unless the name says that they are frozen or given.
    """
    x, n = Inputs.draw(sizes), sizes.characters
    tables = build_tables(x.characters, x.positions, x.weights)
    only_query = Projections(x.weights.query, x.weights.query[:1], x.weights.query[:1])

    def direct_projection() -> Tensor:
        return project_direct(x.characters, x.positions, x.indices, only_query, None, 1).query

    def project_first() -> Tensor:
        rows = project_tables(x.characters, x.positions, only_query, None, 1)
        return project_indexed(Projections(rows.query, rows.key[:, :, :0], rows.value[:, :, :0]), x.indices, n).query

    def direct_qk() -> Tensor:
        two = Projections(x.weights.query, x.weights.key, x.weights.value[:1])
        query, key, _ = project_direct(x.characters, x.positions, x.indices, two, None, 1)
        return direct_scores(query, key)

    def direct_qk_and_v() -> Tensor:
        query, key, _ = project_direct(x.characters, x.positions, x.indices, x.weights, None, 1)
        return direct_scores(query, key)

    def build() -> Any:
        return build_tables(x.characters, x.positions, x.weights)

    def indexed_qk_and_v() -> Tensor:
        built = build()
        indexed_values(built, x.indices)
        return indexed_scores(built, x.indices)

    def with_values_built() -> Tensor:
        built = build()
        weights = column_weights(indexed_scores(built, x.indices))
        return torch.einsum("whl,whld->whd", weights, indexed_values(built, x.indices))

    def direct() -> Tensor:
        return direct_attention(x.characters, x.positions, x.indices, x.weights)

    yield "Q: project first, then index", direct_projection, project_first
    yield "Q K^T by index", direct_qk, lambda: indexed_scores(build(), x.indices)
    yield "Q K^T by index, V built", direct_qk_and_v, indexed_qk_and_v
    yield "whole, V built", direct, with_values_built
    yield "whole, V never built", direct, lambda: indexed_attention(build(), x.indices)
    yield "whole, tables frozen", direct, lambda: indexed_attention(tables, x.indices)
    weights = column_weights(indexed_scores(tables, x.indices))
    yield (
        "pooling alone (tables and weights given)",
        lambda: torch.einsum("whl,whld->whd", weights, indexed_values(tables, x.indices)),
        lambda: pooled_values(tables, x.indices, weights),
    )


@torch.no_grad()
def time_stages(sizes: CallSizes = PUBLISHED_SIZES, repeats: int = 7) -> list[Timing]:
    """Time every stage."""
    found = []
    for name, direct, tables in stages(sizes):
        error = (direct() - tables()).abs().max().item()
        slow, fast = interleaved([direct, tables], repeats)
        found.append(Timing(name, statistics.median(slow), statistics.median(fast), spread(slow, fast), error))
    return found


@torch.no_grad()
def time_scaling(base: CallSizes = PUBLISHED_SIZES, repeats: int = 5) -> list[dict]:
    """Vary one size at a time.

    Returns:
        Per size: seconds of the direct form, of tables and of frozen tables, and the ratios forecast by `indexed.plan`.
    """
    found = []
    for name, values in SWEEPS.items():
        for value in values:
            sizes = replace(base, **{name: value})
            x = Inputs.draw(sizes)
            kept = build_tables(x.characters, x.positions, x.weights)

            def direct(x: Inputs = x) -> Tensor:
                return direct_attention(x.characters, x.positions, x.indices, x.weights)

            def tables(x: Inputs = x) -> Tensor:
                return indexed_attention(build_tables(x.characters, x.positions, x.weights), x.indices)

            def frozen(x: Inputs = x, kept: Any = kept) -> Tensor:
                return indexed_attention(kept, x.indices)

            seconds = interleaved([direct, tables, frozen], repeats)
            forecast = [direct_cost(sizes).total / table_cost(sizes, of).total for of in (False, True)]
            row: dict[str, Any] = {"varied": name, "value": value}
            row |= zip(("direct", "tables", "frozen"), map(statistics.median, seconds), strict=True)
            row |= zip(("forecast", "forecast_frozen"), forecast, strict=True)
            row |= zip(("spread", "spread_frozen"), (spread(seconds[0], own) for own in seconds[1:]), strict=True)
            found.append(row)
    return found


def machine() -> dict[str, Any]:
    """The processor, threads and versions of the measurement."""
    said = describe()
    return {"cores": os.cpu_count(), **{name: said[name] for name in ("processor", "threads", "python", "torch")}}
