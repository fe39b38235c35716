"""The direct form, without tables: every character is looked up first and projected afterwards."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_attn_plugins.indexed.attention import check_indices, column_weights, index_rows
from hf_attn_plugins.indexed.tables import Projections


def project_direct(
    characters: Tensor,
    positions: Tensor,
    indices: Tensor,
    weights: Projections,
    position_weights: Projections | None,
    heads: int,
) -> Projections:
    """Index first: Q = (Index_row(F, I) + P) W, and likewise K and V.

    Args:
        characters: (n, d); positions: (L, d); indices: (W, L') integers.
        weights, position_weights, heads: as in `tables.project_tables`.

    Returns:
        query, key and value, each (W, L', H, dim).
    """
    indices = check_indices(indices, len(positions))
    looked_up, positions = F.embedding(indices, characters), positions[: indices.shape[1]]
    if position_weights is None:
        looked_up = looked_up + positions
        query, key, value = (F.linear(looked_up, weight) for weight in weights)
    else:
        query, key, value = (
            F.linear(looked_up, weight) + F.linear(positions, of_positions)
            for weight, of_positions in zip(weights, position_weights, strict=True)
        )
    return Projections(*(rows.unflatten(-1, (heads, -1)) for rows in (query, key, value)))


def project_indexed(rows: Projections, indices: Tensor, characters: int) -> Projections:
    """Project first, then index: the result (W, L', H, dim) of `project_direct` from `tables.project_tables` rows."""
    return Projections(*(index_rows(table, indices, characters) for table in rows))


def direct_scores(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """QK^T of (W, L, H, dim) tensors, scaled by `scale` (dim**-0.5 when None): (W, L, H, L)."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return (query.transpose(1, 2) @ key.permute(0, 2, 3, 1)).transpose(1, 2) * scale


def direct_attention(
    characters: Tensor,
    positions: Tensor,
    indices: Tensor,
    weights: Projections,
    position_weights: Projections | None = None,
    *,
    heads: int = 1,
    scale: float | None = None,
    padding_index: int | None = None,
) -> Tensor:
    """Scaled dot-product attention within each word: equal to `attention.indexed_attention` up to rounding.

    Args:
        characters: (n, d); positions: (L, d); indices: (W, L') integers in [0, n).
        weights, position_weights, heads: as in `tables.project_tables`.
        scale: factor of the scores; dim**-0.5 when None.
        padding_index: as in `attention.indexed_attention`.

    Returns:
        (W, H, dim); zeros for a word of padding only.

    Raises:
        ValueError: words longer than L, or indices that are no (W, L') integers.
    """
    query, key, value = project_direct(characters, positions, indices, weights, position_weights, heads)
    real = None if padding_index is None else indices != padding_index
    return torch.einsum("whl,wlhd->whd", column_weights(direct_scores(query, key, scale), real), value)
