"""Index-based scaled dot-product attention (ISDPA): scores and pooled values are read from tables by index."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hf_attn_plugins.indexed.tables import Tables

# If n <= WHOLE_ROWS x L, whole rows of scores are copied and then indexed. For larger character sets, single scores are
# looked up, because that cost does not grow with n.
WHOLE_ROWS = 4
# Words are processed in pieces; the largest intermediate tensor of a piece has about this many elements.
PIECE = 1 << 22


def indexed_scores(tables: Tables, indices: Tensor) -> Tensor:
    """Scaled scores QK^T by table look-up: no query, key or score is computed per word.

    Args:
        tables: from `build_tables`.
        indices: (W, L') integers in [0, n), L' <= L; character j of word w is row indices[w, j] at position j.

    Returns:
        (W, L', H, L'): query position, head, key position.

    Raises:
        ValueError: words longer than the tables' positions, or indices that are no (W, L') integers.

    Formula: QK^T = Index_col(Index_row(Mq Mk^T)) + Index_row(Mq Pk^T) + Index_col(Pq Mk^T) + Pq Pk^T.
    """
    indices = check_indices(indices, tables.length)
    (words, length), n = indices.shape, tables.characters
    total, heads, _ = tables.scores.shape
    if whole_rows(tables):
        # Index_row of the character terms and of their position terms together; then Index_col of the result.
        rows = index_rows(tables.scores, indices, n)
        columns = indices[:, None, None].expand(words, length, heads, length)
        return rows[..., :n].gather(-1, columns).add_(rows[..., n : n + length])
    flat, head = tables.scores.view(-1), torch.arange(heads, device=indices.device).view(-1, 1)
    positions = torch.arange(n, n + length, device=indices.device)

    def look_up(query_rows: Tensor, key_rows: Tensor) -> Tensor:
        places = (query_rows[..., None, None] * heads + head) * total + key_rows[..., None, None, :]
        return flat.index_select(0, places.flatten()).view(places.shape)

    of_characters = look_up(indices, indices) + look_up(indices, positions)
    return of_characters + look_up(positions, indices) + look_up(positions, positions)


def whole_rows(tables: Tables) -> bool:
    """Whether `indexed_scores` copies whole rows of scores (see `WHOLE_ROWS`)."""
    return tables.characters <= WHOLE_ROWS * tables.length


def column_weights(scores: Tensor, real: Tensor | None = None) -> Tensor:
    """Softmax over keys, then the mean over query positions: the weight of each character of a word.

    Args:
        scores: (W, L, H, L), scaled.
        real: (W, L) bool, True for real characters. Padding is then no key, and its row is left out of the mean. None
            treats every position as real.

    Returns:
        (W, H, L), each row with sum 1; zeros for a word without real characters.
    """
    if real is None:
        return scores.softmax(-1).mean(1)
    lowest = torch.finfo(scores.dtype).min
    weights = scores.masked_fill(~real[:, None, None], lowest).softmax(-1)
    share = real.to(weights.dtype)
    share = share / share.sum(-1, keepdim=True).clamp_min(1)
    return torch.einsum("wq,wqhk->whk", share, weights)


def pooled_values(tables: Tables, indices: Tensor, weights: Tensor) -> Tensor:
    """sum_j weights_j V_j without building V: weights are summed per table row and multiplied with the value table.

    Args:
        tables: from `build_tables`.
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
    """V = Index_row(Meta^V) + Pos^V, (W, H, L', dim). `pooled_values` gives its weighted sums without building it."""
    return index_rows(tables.values.transpose(0, 1), indices, tables.characters).transpose(1, 2)


def index_rows(table: Tensor, indices: Tensor, characters: int) -> Tensor:
    """Index_row(Meta, I) + Pos of a (n + L, H, dim) table: (W, L', H, dim)."""
    words, length = indices.shape
    meta, position = table[:characters], table[characters : characters + length]
    if words <= characters or length * meta.numel() > PIECE:
        return F.embedding(indices, meta.flatten(1)).view(words, length, *meta.shape[1:]) + position
    # The result is by far the largest tensor. A table of all (position, character) sums lets one look-up write it once;
    # adding the positions afterwards would write it a second time.
    sums = (position.unsqueeze(1) + meta).flatten(0, 1)
    places = indices + torch.arange(length, device=indices.device) * characters
    return F.embedding(places, sums.flatten(1)).view(words, length, *meta.shape[1:])


def indexed_attention(tables: Tables, indices: Tensor, *, padding_index: int | None = None) -> Tensor:
    """ISDPA: the characters of each word attend to each other; the mean over positions is the word's vector.

    Args:
        tables: from `build_tables`.
        indices: (W, L') integers in [0, n).
        padding_index: the padding character. It is no key and is left out of the mean. None treats it as any other
            character.

    Returns:
        (W, H, dim) in `tables.dtype`; zeros for a word of padding only. Words are processed in pieces, so that without
        gradients the additional memory does not grow with W.

    Raises:
        ValueError: words longer than the tables' positions, or indices that are no (W, L') integers.
    """
    indices = check_indices(indices, tables.length)
    heads, length = tables.scores.shape[1], indices.shape[1]
    largest = length * heads * (tables.scores.shape[-1] if whole_rows(tables) else length)
    pieces = []
    for piece in indices.split(max(1, PIECE // largest)):
        real = None if padding_index is None else piece != padding_index
        pieces.append(pooled_values(tables, piece, column_weights(indexed_scores(tables, piece), real)))
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces)).to(tables.dtype)


def check_indices(indices: Tensor, length: int) -> Tensor:
    """`indices` as int64; ValueError unless they are (W, L') integers with 1 <= L' <= `length`."""
    if indices.ndim != 2 or indices.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"words are (W, L) int64 or int32 indices, got {tuple(indices.shape)} {indices.dtype}.")
    if not 1 <= indices.shape[1] <= length:
        raise ValueError(
            f"words of {indices.shape[1]} characters, but there are positions for 1 to {length}: cut or pad the words, "
            "or make more positions."
        )
    return indices.long()
