"""Packed rows for a method that takes one text per row: every text becomes a row, and its results go back.

A text keeps its columns, so that labels, positions and dropped weights are those of the packed row. To the method the
other texts of the row are padding on both sides. Slots hold a text's own tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Apart:
    """The texts of a packed batch as rows of their own, in the order of the batch.

    Attributes:
        rows: (N,) long, the batch row that each of the N texts is packed in.
        real: (N, L) bool, the columns of each text.
        batch: rows of the packed batch.
    """

    rows: Tensor
    real: Tensor
    batch: int

    @classmethod
    def of(cls, texts: Tensor) -> Apart:
        """From `texts` (B, L), the number of each column's text, counted in every row from 0."""
        counts = texts[:, -1] + 1
        rows = torch.arange(len(texts), device=texts.device).repeat_interleave(counts)
        numbers = torch.arange(len(rows), device=texts.device) - (counts.cumsum(0) - counts)[rows]
        return cls(rows, texts[rows] == numbers[:, None], len(texts))

    def take(self, tensor: Tensor, columns: Tensor) -> Tensor:
        """The entries (N, T, ...) of a packed `tensor` (B, L, ...) at `columns` (N, T); an arbitrary one for -1."""
        return tensor[self.rows.to(tensor.device)[:, None], columns.clamp_min(0).to(tensor.device)]

    def together(self, columns: Tensor) -> Tensor:
        """Where the slots of every packed row lie: (B, S) indices into (N * T), -1 behind the last one of a row.

        Args:
            columns: (N, T) long, -1 for slots that are left out.
        """
        text, slot = (columns >= 0).nonzero(as_tuple=True)
        row = self.rows.to(columns.device)[text]  # ascending
        counts = row.bincount(minlength=self.batch)
        place = torch.arange(len(row), device=columns.device) - (counts.cumsum(0) - counts)[row]
        found = columns.new_full((self.batch, int(counts.max())), -1)
        found[row, place] = text * columns.shape[1] + slot
        return found


def at(tensor: Tensor, places: Tensor) -> Tensor:
    """The entries (B, S, ...) of `tensor` (N, T, ...) at `Apart.together`; an arbitrary entry for -1."""
    return tensor.flatten(0, 1)[places.clamp_min(0).to(tensor.device)]
