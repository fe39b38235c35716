"""What a method of attention has to know to run on several ranks, and what is common to all of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Window
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.cqs.cost import CallShape
from hf_attn_plugins.kernels.bound_attend import Kernel
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.plugins import PLUGINS, resolve


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


@dataclass(frozen=True)
class Cost:
    """One rank's share of a prompt, in one layer.

    Attributes:
        sent, received: bytes to and from other ranks.
        held: bytes of queries, keys, values and results on the rank at once, its own and those that came in; what a
            backend or a kernel holds beside them is not in it.
        pairs: (query, key) pairs computed.
        rows: tokens that go through projections and MLP here.
        cache: bytes of keys and values that stay.
        decode: bytes received for each generated token.
    """

    sent: int
    received: int
    held: int
    pairs: int
    rows: int
    cache: int
    decode: int


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

    def cost(self, layout: Layout, rank: int, shape: CallShape) -> Cost:
        """What `rank` does, holds and sends in one layer of a prompt without padding, by its `layout`."""
        ...

    def settle(self, config: Mapping[str, Any], group: Group) -> Method:
        """The method with what depends on the model's config and on the launch, the same on every rank."""
        ...


def method_for(name: str, **options: Any) -> Method:
    """The part of plugin `name` that runs on several ranks (`Plugin.ranks`), with its options validated.

    Raises:
        ValueError: a plugin that runs in one process only, an option it does not have, or a value out of range.
    """
    sharded = [row.name for row in PLUGINS.values() if row.ranks]
    if name not in sharded:
        raise ValueError(f"{name!r} does not run on several ranks: choose one of {', '.join(sharded)}.")
    kind = resolve(PLUGINS[name].ranks)
    unknown = sorted(set(options) - set(kind.names()))
    if unknown:
        raise ValueError(
            f"context_parallel(..., {name!r}) has no option {', '.join(unknown)}: it takes {', '.join(kind.names())}."
        )
    return kind(**options)


def triangle(count: int) -> int:
    """Pairs of a causal square of `count` rows."""
    return count * (count + 1) // 2


def local_columns(real: Tensor, columns: Tensor) -> Tensor:
    """`columns` with -1 in the place of those that hold padding."""
    return torch.where(real.gather(1, columns.clamp_min(0)) & (columns >= 0), columns, -1)
