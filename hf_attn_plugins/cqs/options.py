"""Options of `cqs_attention`."""

from __future__ import annotations

from dataclasses import dataclass

import hf_attn_plugins.cqs.planning.difference_covers as difference_covers
from hf_attn_plugins.core.options import MOST_TOKENS, Options, shown

MOST_WORKERS = 1024  # every new length needs a plan, and planning takes time quadratic in the workers


@dataclass(frozen=True)
class CQSOptions(Options):
    """Options of `cqs_attention`.

    Attributes:
        workers: number of workers W, 1 .. 1024; None chooses it from the length (`cqs.scheduler.default_workers`).
        interest_set: difference cover of Z_W for these workers; None takes the smallest known. Needs `workers`.
        min_length: tokens; shorter prompts, and all decoding, are not divided.
        kernel: a kernel's name (see `kernels.KERNELS`); None chooses by device, dtype and shape.

    Raises:
        ValueError: a value is out of range, or the interest set is no difference cover of Z_W.
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
            # A config file holds a list; plans are cached by the set, which must be hashable.
            object.__setattr__(self, "interest_set", difference_covers.check(self.interest_set, self.workers))
