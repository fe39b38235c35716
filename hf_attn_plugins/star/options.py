"""Options of `star_attention`."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

from hf_attn_plugins.core.options import MOST_TOKENS, Options, shown
from hf_attn_plugins.star.plan import PAPER, Plan, check_anchor, plan_for

MOST_HEADS, MOST_LAYERS = 1 << 16, 1 << 16  # more than any model has


@dataclass(frozen=True)
class StarOptions(Options):
    """Options of `star_attention`; see `star.plan.Plan` for what the sizes mean.

    Attributes:
        block_size: tokens of a block, or None to cut a prompt by its length (dense below `star.plan.DENSE_BELOW`).
        anchor_size: leading tokens that every block attends to, 0 .. block_size + halo_size. None: a few beside a halo,
            else a quarter of the block.
        query_size: last tokens of the prompt, which attend to everything, 0 or more, or None for the default.
        halo_size: tokens just before a block that the block attends to as well, 0 or more. None: by length where no
            block size is given, else 0, which is the paper's plan.
        dense_heads: for every layer the indices of its key heads that see everything, with their queries: a list of
            lists, or None for none. A layer beyond the list has none.
        kernel: a kernel by name (see `kernels.KERNELS`), or None to choose by device, dtype and shape.
        preset: "paper" for sizes by length without near tokens, as in the paper; None for the best that was measured.
    """

    by_layer = ("dense_heads",)

    block_size: int | None = None
    anchor_size: int | None = None
    query_size: int | None = None
    halo_size: int | None = None
    dense_heads: tuple[tuple[int, ...], ...] | None = None
    kernel: str | None = None
    preset: str | None = None

    def __post_init__(self) -> None:
        self._between(1, MOST_TOKENS, "block_size")
        self._between(0, MOST_TOKENS, "anchor_size", "query_size", "halo_size")
        check_anchor(self.anchor_size, self.block_size, self.halo_size)
        if self.preset not in (None, PAPER):
            raise ValueError(f"preset={shown(self.preset)} is unknown: {PAPER!r} or None is allowed.")
        object.__setattr__(self, "dense_heads", heads_of(self.dense_heads))
        self._check_kernel(self.kernel)

    def plan_of(self, length: int) -> Plan:
        """The plan of a prompt of `length` tokens."""
        return plan_for(length, self.block_size, self.anchor_size, self.query_size, self.halo_size, self.preset)

    def for_layer(self, index: int | None) -> StarOptions:
        """The options of one layer: `dense_heads` holds this layer's heads alone, or is None where it has none."""
        if self.dense_heads is None:
            return self
        if index is None:
            raise ValueError(
                "dense_heads lists key heads by layer, but this model's attention modules do not say which layer they "
                "are (no `layer_idx`): leave dense_heads out."
            )
        return _of_layer(self, index)

    def all_sparse(self) -> StarOptions:
        """The same options without dense heads."""
        return dataclasses.replace(self, dense_heads=None)

    @property
    def layer_heads(self) -> tuple[int, ...]:
        """The dense key heads of options that were made `for_layer`, in order."""
        return self.dense_heads[0] if self.dense_heads else ()


@functools.lru_cache(maxsize=1024)
def _of_layer(options: StarOptions, index: int) -> StarOptions:
    heads = options.dense_heads or ()
    own = heads[index] if index < len(heads) else ()
    return dataclasses.replace(options, dense_heads=(own,) if own else None)


def heads_of(given: object) -> tuple[tuple[int, ...], ...] | None:
    """`dense_heads` as sorted tuples; None where no layer names a head.

    Raises:
        ValueError: no list of lists of whole numbers from 0 on, or a head named twice.
    """
    if given is None:
        return None
    if not isinstance(given, list | tuple) or len(given) > MOST_LAYERS:
        raise ValueError(f"dense_heads={shown(given)}: a list of key heads for every layer is needed, or None.")
    layers = []
    for index, heads in enumerate(given):
        whole = isinstance(heads, list | tuple) and all(
            isinstance(head, int) and not isinstance(head, bool) and 0 <= head < MOST_HEADS for head in heads
        )
        if not whole or len(set(heads)) < len(heads):
            raise ValueError(
                f"dense_heads[{index}]={shown(heads)}: a list of different key heads, counted from 0, is needed."
            )
        layers.append(tuple(sorted(heads)))
    return tuple(layers) if any(layers) else None
