"""FlashAttention's forward and backward as in the papers, one tile at a time, with every step recorded.

This file is for reading and for checks: one head, (N, d) matrices, any float dtype. Models run `kernels.attend`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attn_plugins.tiled.plan import Tile, TilePlan


@dataclass(frozen=True)
class TileStep:
    """The state of a tile's rows before and after the tile.

    Attributes:
        tile: the rows and keys.
        scores: (rows, keys), scaled, -inf where hidden.
        weights: (rows, keys), exp(scores - max_after), not normalized.
        max_before, max_after: (rows,), the row maximum of the scores so far.
        sum_before, sum_after: (rows,), the row sum of exp(score - max) over the keys so far.
        rescale: (rows,), exp(max_before - max_after), the factor of the earlier sum and output.
        mean: (rows, d), softmax attention over the keys so far.
    """

    tile: Tile
    scores: Tensor
    weights: Tensor
    max_before: Tensor
    max_after: Tensor
    sum_before: Tensor
    sum_after: Tensor
    rescale: Tensor
    mean: Tensor


@dataclass(frozen=True)
class Forward:
    """The result of a forward pass.

    Attributes:
        out: (N, d).
        lse: (N,), max + log(sum).
        steps: one per tile, in the order in which they ran.
    """

    out: Tensor
    lse: Tensor
    steps: list[TileStep]


def tile_scores(query: Tensor, key: Tensor, tile: Tile, scale: float) -> Tensor:
    """The scaled scores of a tile, (rows, keys); -inf where causality hides the key."""
    scores = query[_slice(tile.rows)] @ key[_slice(tile.keys)].T * scale
    if tile.masked:
        rows, keys = torch.tensor(tile.rows), torch.tensor(tile.keys)
        scores = scores.masked_fill(keys > rows[:, None], -torch.inf)
    return scores


def forward(query: Tensor, key: Tensor, value: Tensor, plan: TilePlan, scale: float) -> Forward:
    """Attention in the tile order of `plan`: `algorithm_1` when keys are outermost, else `flash_attention_2`.

    Args:
        query, key, value: (N, d), any float dtype.
        plan: the tiles of N tokens.
        scale: factor of the scores, usually 1 / sqrt(d).
    """
    run = algorithm_1 if plan.order == "keys-outer" else flash_attention_2
    return run(query, key, value, plan, scale)


def algorithm_1(query: Tensor, key: Tensor, value: Tensor, plan: TilePlan, scale: float) -> Forward:
    """FlashAttention: each tile has its own row maximum, and `out` is normalized after every tile.

    Source: arXiv 2205.14135, algorithm 1, lines 9 to 13.
    """
    out = torch.zeros_like(value)
    total, maximum = query.new_zeros(plan.length), query.new_full((plan.length,), -torch.inf)
    steps = []
    for tile in plan.tiles():
        rows, keys = _slice(tile.rows), _slice(tile.keys)
        old_max, old_sum = maximum[rows].clone(), total[rows].clone()
        scores = tile_scores(query, key, tile, scale)
        local_max = scores.amax(1)
        # A row of a diagonal tile may see none of its keys. exp(-inf + inf) would be NaN, and exp(-inf - 0) is 0.
        local = (scores - torch.where(local_max.isinf(), 0, local_max)[:, None]).exp()
        new_max = torch.maximum(old_max, local_max)
        rescale, local_rescale = (old_max - new_max).exp(), (local_max - new_max).exp()
        new_sum = rescale * old_sum + local_rescale * local.sum(1)
        gathered = (old_sum * rescale)[:, None] * out[rows] + local_rescale[:, None] * (local @ value[keys])
        out[rows], maximum[rows], total[rows] = gathered / new_sum[:, None], new_max, new_sum
        weights = local * local_rescale[:, None]
        steps.append(TileStep(tile, scores, weights, old_max, new_max, old_sum, new_sum, rescale, out[rows].clone()))
    return Forward(out, maximum + total.log(), steps)


def flash_attention_2(query: Tensor, key: Tensor, value: Tensor, plan: TilePlan, scale: float) -> Forward:
    """FlashAttention-2: weights use the running row maximum; rows are divided by their sum once, after the last tile.

    Source: arXiv 2307.08691, algorithm 1.
    """
    gathered = torch.zeros_like(value)
    total, maximum = query.new_zeros(plan.length), query.new_full((plan.length,), -torch.inf)
    steps = []
    for tile in plan.tiles():
        rows, keys = _slice(tile.rows), _slice(tile.keys)
        old_max, old_sum = maximum[rows].clone(), total[rows].clone()
        scores = tile_scores(query, key, tile, scale)
        # Never -inf: every row sees key 0, which is in the first tile of every row.
        new_max = torch.maximum(old_max, scores.amax(1))
        weights, rescale = (scores - new_max[:, None]).exp(), (old_max - new_max).exp()
        new_sum = rescale * old_sum + weights.sum(1)
        gathered[rows] = rescale[:, None] * gathered[rows] + weights @ value[keys]
        maximum[rows], total[rows] = new_max, new_sum
        mean = gathered[rows] / new_sum[:, None]  # recorded for the reader; the algorithm divides once, below
        steps.append(TileStep(tile, scores, weights, old_max, new_max, old_sum, new_sum, rescale, mean))
    return Forward(gathered / total[:, None], maximum + total.log(), steps)


def backward(
    query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, plan: TilePlan, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, tile by tile. exp(scores - lse) are the normalized weights.

    Args:
        query, key, value: (N, d).
        out, lse: (N, d) and (N,), of the forward pass.
        grad_out: (N, d).
        plan, scale: as in the forward pass.

    Source: arXiv 2205.14135, appendix B.4; arXiv 2307.08691, algorithm 2.
    """
    grad_query, grad_key, grad_value = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    # sum_j A_ij dA_ij = sum_c O_ic dO_ic, so that no row of A is needed.
    delta = (grad_out * out).sum(1)
    for tile in plan.tiles():
        rows, keys = _slice(tile.rows), _slice(tile.keys)
        weights = (tile_scores(query, key, tile, scale) - lse[rows, None]).exp()
        grad_value[keys] += weights.T @ grad_out[rows]
        grad_scores = weights * (grad_out[rows] @ value[keys].T - delta[rows, None])
        grad_query[rows] += grad_scores @ key[keys] * scale
        grad_key[keys] += grad_scores.T @ query[rows] * scale
    return grad_query, grad_key, grad_value


def unnormalised_backward(
    query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """A wrong backward, for comparison: it uses P = exp(S - max) instead of the weights A = P / sum(P).

    All three gradients are wrong. dV is multiplied by each row's sum s. In dS = P * (dP - sum(P * dP)) the first term
    is multiplied by s and the second by s^2, so that the direction is wrong too.
    """
    scores = query @ key.T * scale
    if causal:
        scores, _ = causal_mask(scores)
    unnormalised = (scores - scores.amax(1, keepdim=True)).exp()
    grad_scores = softmax_gradient(unnormalised, grad_out @ value.T)
    return grad_scores @ key * scale, grad_scores.T @ query * scale, unnormalised.T @ grad_out


def plain_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool = False) -> Tensor:
    """softmax(scale * query key^T) value, with the whole score matrix in memory."""
    scores = query @ key.T * scale
    return softmax(causal_mask(scores)[0] if causal else scores) @ value


def softmax(scores: Tensor) -> Tensor:
    """Row-wise softmax. The row maximum is subtracted first: the result is the same, and exp() stays finite."""
    numerator = (scores - scores.amax(1, keepdim=True)).exp()
    return numerator / numerator.sum(1, keepdim=True)


def softmax_gradient(weights: Tensor, grad_weights: Tensor) -> Tensor:
    """The gradient of the scores: each row's Jacobian diag(a) - a a^T times g, which is a * (g - sum(a * g)).

    It needs O(N) memory per row; the Jacobian would need O(N^2). `weights` must be normalized.
    """
    return weights * (grad_weights - (weights * grad_weights).sum(1, keepdim=True))


def causal_mask(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (T, S) with -inf above the diagonal, and the bool mask of the visible scores."""
    visible = torch.ones_like(scores, dtype=torch.bool).tril()
    return scores.masked_fill(~visible, -torch.inf), visible


def _slice(positions: range) -> slice:
    return slice(positions.start, positions.stop)
