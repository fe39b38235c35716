"""Options of `star_attention`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_attn_plugins.core.options import MOST_TOKENS, Options
from hf_attn_plugins.star.plan import check_anchor


@dataclass(frozen=True)
class StarOptions(Options):
    """Options of `star_attention`; see `star.plan.Plan` for what the sizes mean.

    Attributes:
        block_size: tokens of a block, or None to cut a prompt by its length (dense below `star.plan.DENSE_BELOW`).
        anchor_size: leading tokens that every block attends to, 0 .. block_size, or None for a fraction of the block.
        query_size: last tokens of the prompt, which attend to everything, 0 or more, or None for the default.
        kernel: a kernel by name (see `kernels.KERNELS`), or None to choose by device, dtype and shape.
    """

    block_size: int | None = None
    anchor_size: int | None = None
    query_size: int | None = None
    kernel: str | None = None

    def __post_init__(self) -> None:
        self._between(1, MOST_TOKENS, "block_size")
        self._between(0, MOST_TOKENS, "anchor_size", "query_size")
        check_anchor(self.anchor_size, self.block_size)
        self._check_kernel(self.kernel)
