"""Index-based scaled dot-product attention (ISDPA): scores and pooled values are read from tables by index."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_attn_plugins.indexed.plan import Sizes, words_per_piece
from hf_attn_plugins.indexed.tables import Tables

# Up to this many characters per position a whole row of scores is copied and then indexed; beyond, single scores are
# looked up one by one, whose cost does not grow with the character set.
WHOLE_ROWS = 8


def indexed_scores(tables: Tables, indices: Tensor) -> Tensor:
    """QK^T by index, scaled: no query, key or score is computed per word.

    Args:
        tables: from `build_tables`.
        indices: (W, L') integers in [0, n), L' <= L; character j of word w is row indices[w, j] at position j.

    Returns:
        (W, L', H, L'): query position, head, key position.

    Raises:
        ValueError: words longer than the tables' positions, or indices that are no (W, L') integers.

    Source: seed ISDPA, QK^T = Index_col(Index_row(Mq Mk^T)) + Index_row(Mq Pk^T) + Index_col(Pq Mk^T) + Pq Pk^T.
    """
    indices = check_indices(indices, tables.length)
    (words, length), n, heads = indices.shape, tables.characters, tables.scores.shape[1]
    meta, position = tables.scores[:n], tables.scores[n : n + length]
    if n <= WHOLE_ROWS * tables.length:
        # Index_row of both meta terms and their position terms in one go, then Index_col of what is left.
        rows = F.embedding(indices, meta.flatten(1)).view(words, length, heads, meta.shape[-1]) + position
        columns = indices[:, None, None].expand(words, length, heads, length)
        return rows[..., :n].gather(-1, columns) + rows[..., n : n + length]
    meta_meta = meta[..., :n].transpose(1, 2).reshape(n * n, heads)
    pairs = F.embedding(indices[:, :, None] * n + indices[:, None], meta_meta).transpose(-1, -2)
    by_query = F.embedding(indices, meta[..., n : n + length].flatten(1)).view(words, length, heads, length)
    by_key = F.embedding(indices, position[..., :n].permute(2, 0, 1).flatten(1)).view(words, length, length, heads)
    return pairs + by_query + by_key.permute(0, 2, 3, 1) + position[..., n : n + length]


def column_weights(scores: Tensor, real: Tensor | None = None) -> Tensor:
    """Softmax over keys, then the mean over query positions: what each character of a word contributes.

    Args:
        scores: (W, L, H, L), scaled.
        real: (W, L) bool, True for real characters; padding is then neither seen nor averaged over. None keeps every
            position, as the seed does.

    Returns:
        (W, H, L), rows that sum to 1; all 0 for a word without real characters.
    """
    if real is None:
        return scores.softmax(-1).mean(1)
    lowest = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(~real[:, None, None], lowest).softmax(-1)
    share = real.to(weights.dtype)
    share = share / share.sum(-1, keepdim=True).clamp_min(1)
    return torch.einsum("wq,wqhk->whk", share, weights)


def pooled_values(tables: Tables, indices: Tensor, weights: Tensor) -> Tensor:
    """sum_j weights_j V_j without V: weights are summed per character and position, then meet the small tables.

    Args:
        indices: (W, L') integers in [0, n).
        weights: (W, H, L').

    Returns:
        (W, H, dim).
    """
    words, heads, length = weights.shape
    per_row = weights.new_zeros(words, heads, tables.characters)
    per_row = per_row.scatter_add(-1, indices.unsqueeze(1).expand(words, heads, length), weights)
    per_row = torch.cat([per_row, F.pad(weights, (0, tables.length - length))], -1)
    return torch.einsum("whr,hrd->whd", per_row, tables.values)


def indexed_values(tables: Tables, indices: Tensor) -> Tensor:
    """V = Index_row(Meta^V) + Pos^V, built: (W, H, L', dim); what `pooled_values` does without."""
    meta, position = tables.values[:, : tables.characters], tables.values[:, tables.characters :]
    return meta[:, indices].transpose(0, 1) + position[:, : indices.shape[1]]


def indexed_attention(tables: Tables, indices: Tensor, *, padding_index: int | None = None) -> Tensor:
    """ISDPA whole: each word's characters attend to each other, and their mean over positions is the word's vector.

    Args:
        tables: from `build_tables`.
        indices: (W, L') integers in [0, n).
        padding_index: the character that pads; it is neither attended to nor averaged over. None treats it as any other
            character, as the seed does.

    Returns:
        (W, H, dim) in `tables.dtype`, 0 for words of padding alone. Words are taken in pieces, so that the memory
        beside it does not grow with W unless gradients are kept.
    """
    indices = check_indices(indices, tables.length)
    heads, dim = tables.scores.shape[1], tables.values.shape[-1]
    sizes = Sizes(len(indices), indices.shape[1], tables.characters, 1, heads, dim)
    pieces = []
    for piece in indices.split(words_per_piece(sizes)):
        real = None if padding_index is None else piece != padding_index
        pieces.append(pooled_values(tables, piece, column_weights(indexed_scores(tables, piece), real)))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(tables.dtype)


def check_indices(indices: Tensor, length: int) -> Tensor:
    """`indices` as int64; ValueError unless they are (W, L') integers with 1 <= L' <= `length`."""
    if indices.ndim != 2 or indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"words are (W, L) int64 or int32 indices, got {tuple(indices.shape)} {indices.dtype}.")
    if not 1 <= indices.shape[1] <= length:
        raise ValueError(f"words of {indices.shape[1]} characters, but there are positions for 1 to {length}.")
    return indices.long()
