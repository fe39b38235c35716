"""Two ways to combine the heads of a word into one vector: concatenation, or a 2-D stack."""

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

    Its weights mix heads only, for each column alike. It has H * hidden + hidden * outputs weights, and concatenation
    has H * dim * width. Example: H = 32, dim = width = 512, hidden = 16, outputs = 1: 528 weights against 8,388,608.
    """

    def __init__(self, heads: int, hidden: int = 16, outputs: int = 1) -> None:
        super().__init__()
        self.hidden = nn.Linear(heads, hidden, bias=False)
        self.output = nn.Linear(hidden, outputs, bias=False)

    def forward(self, heads: Tensor) -> Tensor:
        """Combine (W, H, dim) into (W, dim * outputs)."""
        stacked = torch.tanh(self.hidden(heads.transpose(1, 2)))
        return torch.tanh(self.output(stacked)).flatten(1)
