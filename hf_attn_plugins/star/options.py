"""Options of `star_attention`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_attn_plugins.core.options import Options
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
        self._positive("block_size")
        for name in ("anchor_size", "query_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ValueError(f"{name}={value!r}: a whole number of at least 0 is needed, or None for the default.")
        check_anchor(self.anchor_size, self.block_size)
        self._check_kernel(self.kernel)
