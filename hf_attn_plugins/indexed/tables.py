"""The tables of indexed attention: scores and values, computed once per character and position, not per word."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class Projections(NamedTuple):
    """Weights of query, key and value as in nn.Linear, each (H * dim, d), float."""

    query: Tensor
    key: Tensor
    value: Tensor


class Tables(NamedTuple):
    """The tables of one layer. Rows 0 .. n-1 belong to characters, rows n .. n+L-1 to positions.

    Attributes:
        scores: (n + L, H, n + L), the scaled product of every query row with every key row. Its four blocks are
            character x character, character x position, position x character and position x position.
        values: (H, n + L, dim).
        characters: n.
        dtype: of the results. The tables themselves are float32 or float64.
    """

    scores: Tensor
    values: Tensor
    characters: int
    dtype: torch.dtype

    @property
    def length(self) -> int:
        """L, the number of positions."""
        return self.scores.shape[0] - self.characters


def sinusoids(length: int, width: int) -> Tensor:
    """The sine and cosine positions of "Attention is all you need", section 3.5: (length, width) float32."""
    frequencies = 1e4 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    phases = torch.outer(torch.arange(length, dtype=torch.float64), frequencies)
    table = torch.zeros(length, width)
    table[:, 0::2] = phases.sin()
    table[:, 1::2] = phases.cos()[:, : width // 2]
    return table


def project_tables(
    characters: Tensor, positions: Tensor, weights: Projections, position_weights: Projections | None, heads: int
) -> Projections:
    """Project every table row: n rows of characters times weights, then L rows of positions times their weights.

    Args:
        characters: (n, d) table of the characters.
        positions: (L, d) table of the positions.
        weights: the projections of characters.
        position_weights: the projections of positions; None uses `weights`, which gives the direct form (f + P) W.
        heads: H.

    Returns:
        query, key and value rows, each (n + L, H, dim).

    Raises:
        ValueError: widths that do not agree, or weights whose rows are no multiple of `heads`.
    """
    if not characters.shape[-1] == positions.shape[-1] == weights.query.shape[-1]:
        widths = f"{characters.shape[-1]}, {positions.shape[-1]} and {weights.query.shape[-1]}"
        raise ValueError(f"characters, positions and weights must share one width, got {widths}.")
    if any(weight.shape[0] % heads for weight in weights):
        shapes = [tuple(weight.shape) for weight in weights]
        raise ValueError(f"the weights {shapes} cannot be split into heads={heads}.")
    if position_weights is None:
        rows = torch.cat([characters, positions])
        query, key, value = (F.linear(rows, weight) for weight in weights)
    else:
        query, key, value = (
            torch.cat([F.linear(characters, of_characters), F.linear(positions, of_positions)])
            for of_characters, of_positions in zip(weights, position_weights, strict=True)
        )
    return Projections(*(rows.unflatten(-1, (heads, -1)) for rows in (query, key, value)))


def build_tables(
    characters: Tensor,
    positions: Tensor,
    weights: Projections,
    position_weights: Projections | None = None,
    *,
    heads: int = 1,
    scale: float | None = None,
) -> Tables:
    """The tables that `attention.indexed_attention` reads; differentiable in every argument.

    Half-precision arguments are converted to float32 first. A score is the sum of four table entries; rounding each of
    them would lose more accuracy than the direct form does. The tables are small.

    Args and raises as in `project_tables`; `scale` multiplies the scores, dim**-0.5 when None.

    The four index terms of QK^T (see `attention.indexed_scores`) are computed as one product of stacked rows.
    """
    dtype = characters.dtype
    if dtype in (torch.float16, torch.bfloat16):
        characters, positions, weights = characters.float(), positions.float(), _float(weights)
        position_weights = None if position_weights is None else _float(position_weights)
    rows = project_tables(characters, positions, weights, position_weights, heads)
    scale = rows.query.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("ahd,bhd->ahb", rows.query * scale, rows.key)
    return Tables(scores.contiguous(), rows.value.transpose(0, 1).contiguous(), characters.shape[0], dtype)


def _float(weights: Projections) -> Projections:
    return Projections(*(weight.float() for weight in weights))
