"""The interface of a method that runs on several ranks, and what all these methods share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Window
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.cqs.planning.cost import CallShape
from hf_attn_plugins.kernels.bound_attend import BoundAttend
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.plugins import PLUGINS, resolve


@dataclass(frozen=True, eq=False)
class Layout:
    """The part of a prompt, which starts an empty cache, or of a later turn that one rank computes.

    A *column* is an index into the tokens that every rank was given in this forward. A *slot* is an index into this
    rank's forward.
    Example: 8 tokens on 2 ranks by `partition.mirrored`: rank 0 computes columns 0, 1, 6, 7 in its slots 0 .. 3.

    Attributes:
        columns: (B, T) long, the column in each slot; -1 where a slot has none. T is at least 1. An exact method
            computes padding, too: after a prompt padded on the right, `generate` reads the logits of a padded column.
        stored: (S,) long, the slots whose keys and values this rank stores. Every real column is stored by one rank.
        reported: (R,) long, the slots whose hidden states this rank returns. One rank reports each computed column.
        loads: number of slots that each rank stores of this forward; this rank's entry is S.
        merged: rows whose results are merged over all ranks in every layer (Star's query).
        fresh: the runs of columns in this rank's slots, of a dealt later turn only (`turns.deal`).
        extra: data of the method itself, for its `attention` and `cost`.
    """

    columns: Tensor
    stored: Tensor
    reported: Tensor
    loads: list[int]
    merged: int = 0
    fresh: tuple[range, ...] = ()
    extra: Any = None


@dataclass(frozen=True, eq=False)
class Step:
    """One forward of the model on this rank.

    Attributes:
        first: number of columns before this forward; 0 for a forward that starts a cache.
        columns: (B, T) long on the model's device, the column of each query row; -1 for padding.
        layout: the layout of a sharded prompt or of a dealt later turn; None if all ranks have the same rows (decoding,
            short later turns).
        keys: (B, S) long on the model's device, the column of each key that this rank stores, those of this forward
            included; -1 for padding. None for a sharded prompt.
        gaps: whether `columns` or `keys` contains -1.
        fresh: the rows of this forward whose keys this rank stores, as runs. Their keys are the last ones in `keys`.
            Rows are counted among all tokens of the forward, also in a dealt turn.
        texts: (B, L) long on the model's device, the number of the text that each column of a sharded prompt belongs
            to; a row sees keys of its own text only. None if every batch row is one text.
        packed_in: (N,) long on the model's device, where each of N rows is a text taken from a packed row: the row of
            the batch that it was taken from. None otherwise.
    """

    first: int
    columns: Tensor
    layout: Layout | None
    keys: Tensor | None
    gaps: bool
    fresh: tuple[range, ...] = ()
    texts: Tensor | None = None
    packed_in: Tensor | None = None

    @property
    def is_prompt(self) -> bool:
        """Whether this forward is a sharded prompt, which the method's own attention computes."""
        return self.layout is not None and self.first == 0


@dataclass(frozen=True)
class Cost:
    """What one rank computes, stores and exchanges for a prompt, in one layer.

    Attributes:
        sent, received: bytes to and from other ranks.
        held: peak bytes of queries, keys, values and results on the rank, received ones included. Buffers of the
            communication backend and of the kernel are not counted.
        pairs: (query, key) pairs computed.
        rows: tokens that pass through projections and MLP on this rank.
        cache: bytes of keys and values in the cache after the prompt.
        decode: bytes received per generated token.
    """

    sent: int
    received: int
    held: int
    pairs: int
    rows: int
    cache: int
    decode: int


class Method(Protocol):
    """A method on several ranks: `context_parallel(model, name)` uses `star.Star`, `cqs.CQS` or `dense.Dense`.

    Attributes:
        trains: whether the exchanges carry gradients.
        packs: whether a batch row may hold several texts (`Step.texts`). If not, each text becomes a row of its own.
        computes_padding: whether some rank computes each column of padding, so that its label counts as in one process.
    """

    trains: bool
    packs: bool
    computes_padding: bool

    def deal(self, real: Tensor, rank: int, size: int) -> Layout | None:
        """The layout of a prompt; None if the prompt is too short to be divided, so that every rank computes all of it.

        Args:
            real: (B, L) bool on the CPU, False for padding.
            rank, size: this rank, and the number of ranks.
        """
        ...

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, window: Window, step: Step, kernel: BoundAttend, group: Group
    ) -> Partial:
        """Attention of this rank's rows of a sharded prompt over the keys of all ranks that the method lets them see.

        Decoding and later turns are not here: `decode.later` and `turns.attention` compute them for every method.

        Args:
            query: (B, Hq, T, D), one row per slot of `step.layout`.
            key, value: (B, Hkv, T, D) and (B, Hkv, T, Dv), likewise.
            window: (left, right) of this layer, in columns.
            step: the forward under way, with its layout.
            kernel: the attention kernel with its scale, softcap and dropout.
            group: the ranks.

        Returns:
            `Partial` of all T slots.
        """
        ...

    def for_layer(self, index: int | None) -> Method:
        """The method of one layer: `attention` and `cost` are asked of it, `deal` is the same for all layers.

        Args:
            index: the layer, from 0; None if the model's modules do not say which layer they are.

        Raises:
            ValueError: the method differs from layer to layer, and `index` is None.
        """
        ...

    def cost(self, layout: Layout, rank: int, shape: CallShape) -> Cost:
        """The cost on `rank` of one layer of a prompt without padding, counted from the rank's `layout`."""
        ...

    def settle(self, config: Mapping[str, Any], group: Group) -> Method:
        """A copy with the fields that depend on the model's config and on the launch; the same on every rank."""
        ...


def method_for(name: str, **options: Any) -> Method:
    """The class that runs plugin `name` on several ranks (`Plugin.ranks`), made with validated options.

    Raises:
        ValueError: a plugin that runs in one process only, an option that the plugin does not have, or a value out of
            range.
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
    """(query, key) pairs of causal attention of `count` tokens over themselves: count (count + 1) / 2."""
    return count * (count + 1) // 2


def local_columns(real: Tensor, columns: Tensor) -> Tensor:
    """`columns` (B, T) with -1 where `real` (B, L) says that the column holds padding."""
    return torch.where(real.gather(1, columns.clamp_min(0)) & (columns >= 0), columns, -1)
