"""Options of `tiled_attention`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_attn_plugins.core.options import Options


@dataclass(frozen=True)
class TiledOptions(Options):
    """Options of `tiled_attention`.

    Attributes:
        kernel: a kernel's name (see `kernels.KERNELS`); None chooses by device, dtype and shape.
    """

    kernel: str | None = None

    def __post_init__(self) -> None:
        self._check_kernel(self.kernel)
