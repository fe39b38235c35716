"""One frozen dataclass of options per plugin: validated here, stored as a plain dict in `config.hf_attn_plugins`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST_TOKENS = 1 << 31  # longer than any context, and what 32-bit places of tokens can count
MOST_WORKERS = 1024  # the plan is made before every new length, in time that grows with the square of the workers


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

    @classmethod
    def of(cls, stored: Any, where: str) -> Options:
        """The options that a config holds for this plugin.

        Args:
            stored: what stands there; None for nothing.
            where: the place, for the message.

        Raises:
            ValueError: no mapping, an option that this plugin does not have, or a value that it does not take.
        """
        if not isinstance(stored, Mapping | None):
            raise ValueError(f"{where} is {_shown(stored)}: a mapping of options to values is needed.")
        unknown = [name for name in stored or () if name not in cls.names()]
        if unknown:
            raise ValueError(
                f"{where} has the unknown option {_shown(unknown[0])}: it takes {', '.join(cls.names())}; remove it "
                "from the config, or load with the release that wrote it."
            )
        try:
            return cls(**(stored or {}))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _positive(self, *names: str) -> None:
        self._between(1, MOST_TOKENS, *names)

    def _between(self, least: int, most: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"{name}={_shown(value)}: a whole number of at least {least} is needed, or None for the default."
                )
            if value > most:
                raise ValueError(f"{name}={_shown(value)}: at most {most} is allowed.")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_kernel(name: Any) -> None:
    from hf_attn_plugins.kernels import KERNELS

    if name is not None and (not isinstance(name, str) or name not in KERNELS):
        raise ValueError(f"kernel={_shown(name)} is unknown: choose one of {', '.join(KERNELS)}, or None.")


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

        self._between(1, MOST_TOKENS, "block_size")
        self._between(0, MOST_TOKENS, "anchor_size", "query_size")
        check_anchor(self.anchor_size, self.block_size)
        _check_kernel(self.kernel)


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
        from hf_attn_plugins.cqs import covers

        self._between(1, MOST_WORKERS, "workers")
        if self.min_length is None:
            raise ValueError("min_length=None: a whole number of at least 1 is needed.")
        self._between(1, MOST_TOKENS, "min_length")
        _check_kernel(self.kernel)
        if self.interest_set is not None:
            if self.workers is None:
                raise ValueError(f"interest_set={self.interest_set} needs workers, the number it is a cover for.")
            if not isinstance(self.interest_set, (list, tuple)):
                raise ValueError(f"interest_set={_shown(self.interest_set)}: a list of whole numbers is needed.")
            # A list when it comes from a config file; a tuple can be hashed, which lets plans be kept.
            object.__setattr__(self, "interest_set", covers.check(self.interest_set, self.workers))
