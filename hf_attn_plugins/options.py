"""One frozen dataclass of options per plugin: validated here, stored as a plain dict in `config.hf_attn_plugins`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Options:
    """Base of the options; subclasses are dataclasses whose fields all have defaults."""

    @classmethod
    def names(cls) -> list[str]:
        """The names of the options."""
        return [field.name for field in dataclasses.fields(cls)]

    def as_dict(self) -> dict[str, Any]:
        """The options that differ from their defaults, as JSON-ready values."""
        fields = dataclasses.fields(self)
        return {f.name: getattr(self, f.name) for f in fields if getattr(self, f.name) != f.default}

    def _positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name}={value!r}: a whole number of at least 1 is needed, or None for the default.")


def _check_kernel(name: str | None) -> None:
    from hf_attn_plugins.kernels import KERNELS

    if name is not None and name not in KERNELS:
        raise ValueError(f"kernel={name!r} is unknown: choose one of {', '.join(KERNELS)}, or None.")


@dataclass(frozen=True)
class TiledOptions(Options):
    """Options of `tiled_attention`.

    Attributes:
        kernel: a kernel by name (see `kernels.KERNELS`), or None to choose by device, dtype and shape.
    """

    kernel: str | None = None

    def __post_init__(self) -> None:
        _check_kernel(self.kernel)


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
        from hf_attn_plugins.star.plan import check_anchor

        self._positive("block_size")
        for name in ("anchor_size", "query_size"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 0):
                raise ValueError(f"{name}={value!r}: a whole number of at least 0 is needed, or None for the default.")
        check_anchor(self.anchor_size, self.block_size)
        _check_kernel(self.kernel)


@dataclass(frozen=True)
class CQSOptions(Options):
    """Options of `cqs_attention`.

    Attributes:
        workers: number of workers W, or None to choose it from the length (`cqs.scheduler.default_workers`).
        interest_set: difference cover of Z_W for these workers, or None for the smallest known; needs `workers`.
        min_length: prefills shorter than this, and all decoding, go straight to tiled attention.
        kernel: a kernel by name (see `kernels.KERNELS`), or None to choose by device, dtype and shape.
    """

    workers: int | None = None
    interest_set: tuple[int, ...] | None = None
    min_length: int = 1024
    kernel: str | None = None

    def __post_init__(self) -> None:
        from hf_attn_plugins.cqs import covers

        self._positive("workers", "min_length")
        _check_kernel(self.kernel)
        if self.interest_set is not None:
            if self.workers is None:
                raise ValueError(f"interest_set={self.interest_set} needs workers, the number it is a cover for.")
            # A list when it comes from a config file; a tuple can be hashed, which lets plans be kept.
            object.__setattr__(self, "interest_set", covers.check(self.interest_set, self.workers))
