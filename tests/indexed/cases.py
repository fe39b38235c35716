"""Inputs and the oracle that the tests of indexed attention share."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn_plugins.indexed import Projections
from hf_attn_plugins.testing import dense_attention


def draw(
    characters: int, length: int, width: int, columns: int, *, tied: bool, seed: int = 0, sharpness: float = 2.0
) -> tuple[Tensor, Tensor, Projections, Projections | None]:
    """float64 tables and weights whose softmax is sharp."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    own, of_positions = (
        Projections(*(sharpness * normal(columns, width) / width**0.5 for _ in range(3))) for _ in "ab"
    )
    return normal(characters, width), normal(length, width), own, None if tied else of_positions


def draw_words(words: int, length: int, characters: int, seed: int = 0) -> Tensor:
    """(W, L) indices of words of every length, padded with 0: row 0 is full, row 1 is padding alone."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.randint(1, characters, (words, length), generator=generator)
    lengths = torch.randint(1, length + 1, (words, 1), generator=generator)
    indices[torch.arange(length) >= lengths] = 0
    indices[0] = torch.randint(1, characters, (length,), generator=generator)
    if words > 1:
        indices[1] = 0
    return indices


def oracle(
    characters: Tensor,
    positions: Tensor,
    indices: Tensor,
    own: Projections,
    of_positions: Projections | None,
    heads: int,
    padding_index: int | None,
) -> Tensor:
    """Character by character from the definition: (W, H, dim), through `testing.dense_attention`."""
    of_positions = of_positions or own
    rows = [
        torch.stack(
            [torch.stack([of_c @ characters[c] + of_p @ positions[j] for j, c in enumerate(w)]) for w in indices]
        )
        for of_c, of_p in zip(own, of_positions, strict=True)
    ]
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in rows)
    real = torch.ones_like(indices, dtype=torch.bool) if padding_index is None else indices != padding_index
    out, _ = dense_attention(query, key, value, real[:, None, None, :])
    pooled = [
        o[:, keep].mean(1) if keep.any() else torch.zeros_like(o[:, 0]) for o, keep in zip(out, real, strict=True)
    ]
    return torch.stack(pooled)
