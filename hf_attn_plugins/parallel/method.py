"""What a method of attention has to know to run on several ranks, and what is common to all of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_attn_plugins.kernels.bound import Kernel
from hf_attn_plugins.masks import Window
from hf_attn_plugins.parallel.group import Group
from hf_attn_plugins.partial import Partial


@dataclass(frozen=True, eq=False)
class Layout:
    """What a rank does of a prompt that starts an empty cache.

    A *slot* is a place in this rank's forward, a *column* a place in the prompt as every rank was given it.

    Attributes:
        columns: (B, T) long, the column in each slot, -1 for a slot without a token. At least one slot.
        stored: (S,) long, the slots whose keys and values stay on this rank; every real column is stored on one rank.
        reported: (R,) long, the slots whose hidden states this rank answers for; every real column has one such rank.
        loads: number of slots that each rank stores, this one's being S.
        merged: rows that are merged over all ranks in every layer (Star's query).
        extra: what else the method wants to find again in its attention.
    """

    columns: Tensor
    stored: Tensor
    reported: Tensor
    loads: list[int]
    merged: int = 0
    extra: Any = None


@dataclass(frozen=True, eq=False)
class Step:
    """One forward of the model on this rank.

    Attributes:
        first: columns before this forward: 0 where it starts a cache.
        columns: (B, T) long on the model's device, the column of each query row, -1 for none.
        layout: of a sharded prompt; None where the rows are the same on every rank (decoding, later turns).
        keys: (B, S) long on the model's device, the columns of the keys on this rank, this forward's included; -1 for
            none. None for a sharded prompt.
        gaps: whether any of `columns` or `keys` is -1.
        fresh: which of this forward's rows have their keys on this rank: the last ones of `keys`.
    """

    first: int
    columns: Tensor
    layout: Layout | None
    keys: Tensor | None
    gaps: bool
    fresh: range = range(0)


class Method(Protocol):
    """A plan over ranks: `star.Star`, `dense.Dense`, ... stand behind `context_parallel(model, name)`.

    Attributes:
        trains: whether its exchanges carry gradients. Its layouts are then runs of columns in the order of the ranks,
            each stored where it is computed.
    """

    trains: bool

    def deal(self, real: Tensor, rank: int, size: int) -> Layout | None:
        """The layout of a prompt, or None where it is too short to be cut and every rank does all of it.

        Args:
            real: (B, L) bool on the CPU, False for padding.
        """
        ...

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, window: Window, step: Step, kernel: Kernel, group: Group
    ) -> Partial:
        """Attention of this rank's rows of a sharded prompt over keys anywhere; decoding is `later` for all methods.

        Args:
            query: (B, Hq, T, D); key, value: (B, Hkv, T, D and Dv): the slots of `step.layout`.
            window: of this layer, in columns.
        """
        ...


def local_columns(real: Tensor, columns: Tensor) -> Tensor:
    """`columns` with -1 in the place of those that hold padding."""
    return torch.where(real.gather(1, columns.clamp_min(0)) & (columns >= 0), columns, -1)
