"""Options of `cqs_attention`."""

from __future__ import annotations

from dataclasses import dataclass

import hf_attn_plugins.cqs.difference_covers as difference_covers
from hf_attn_plugins.core.options import MOST_TOKENS, Options, shown

MOST_WORKERS = 1024  # the plan is made before every new length, in time that grows with the square of the workers


@dataclass(frozen=True)
class CQSOptions(Options):
    """Options of `cqs_attention`.

    Attributes:
        workers: number of workers W, 1 .. 1024, or None to choose it from the length (`cqs.scheduler.default_workers`).
        interest_set: difference cover of Z_W for these workers, or None for the smallest known; needs `workers`.
        min_length: prefills shorter than this, and all decoding, go straight to tiled attention.
        kernel: a kernel by name (see `kernels.KERNELS`), or None to choose by device, dtype and shape.
    """

    workers: int | None = None
    interest_set: tuple[int, ...] | None = None
    min_length: int = 1024
    kernel: str | None = None

    def __post_init__(self) -> None:
        self._between(1, MOST_WORKERS, "workers")
        if self.min_length is None:
            raise ValueError("min_length=None: a whole number of at least 1 is needed.")
        self._between(1, MOST_TOKENS, "min_length")
        self._check_kernel(self.kernel)
        if self.interest_set is not None:
            if self.workers is None:
                raise ValueError(f"interest_set={self.interest_set} needs workers, the number it is a cover for.")
            if not isinstance(self.interest_set, list | tuple):
                raise ValueError(f"interest_set={shown(self.interest_set)}: a list of whole numbers is needed.")
            # A list when it comes from a config file; a tuple can be hashed, which lets plans be kept.
            object.__setattr__(self, "interest_set", difference_covers.check(self.interest_set, self.workers))
