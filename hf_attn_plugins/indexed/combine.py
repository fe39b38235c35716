"""How the heads of a word become its vector: concatenation, or the seed's 2-D stack."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Concatenate(nn.Module):
    """Concat(head_1, ..., head_H) W^O: (W, H, dim) -> (W, width)."""

    def __init__(self, heads: int, head_dim: int, width: int) -> None:
        super().__init__()
        self.output = nn.Linear(heads * head_dim, width, bias=False)

    def forward(self, heads: Tensor) -> Tensor:
        """Combine (W, H, dim) into (W, width)."""
        return self.output(heads.flatten(1))


class Stack2D(nn.Module):
    """Tanh(Tanh(Stack(head_1, ..., head_H) W^H) W^O) over the head axis: (W, H, dim) -> (W, dim * outputs).

    Its weights mix heads only, column by column: H * hidden + hidden * outputs of them, against H * dim * width of the
    concatenation (some 16 thousand times fewer at the seed's 32 heads of 512).

    Source: the seed, "2-D stack for multi-head attentions".
    """

    def __init__(self, heads: int, hidden: int = 16, outputs: int = 1) -> None:
        super().__init__()
        self.hidden = nn.Linear(heads, hidden, bias=False)
        self.output = nn.Linear(hidden, outputs, bias=False)

    def forward(self, heads: Tensor) -> Tensor:
        """Combine (W, H, dim) into (W, dim * outputs)."""
        stacked = torch.tanh(self.hidden(heads.transpose(1, 2)))
        return torch.tanh(self.output(stacked)).flatten(1)
