"""The base of a method's options: a frozen dataclass, stored as a plain dict in `config.hf_attn_plugins`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

# The kernels of `kernels.choose`, by name; they stand here because options are checked before any kernel is imported.
KERNELS = ("reference", "aten", "cpu_tiled", "cpu_fused", "triton", "flex")


MOST_TOKENS = 1 << 31  # longer than any context, and what 32-bit places of tokens can count


@dataclass(frozen=True)
class Options:
    """Base of the options; subclasses are dataclasses whose fields all have defaults.

    Attributes:
        by_layer: names of the options that hold something else for every layer of a model.
    """

    by_layer: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def names(cls) -> list[str]:
        """The names of the options."""
        return [field.name for field in dataclasses.fields(cls)]

    def as_dict(self) -> dict[str, Any]:
        """The options that differ from their defaults, as JSON-ready values."""
        fields = dataclasses.fields(self)
        return {f.name: _plain(getattr(self, f.name)) for f in fields if getattr(self, f.name) != f.default}

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
            raise ValueError(f"{where} is {shown(stored)}: a mapping of options to values is needed.")
        unknown = [name for name in stored or () if name not in cls.names()]
        if unknown:
            raise ValueError(
                f"{where} has the unknown option {shown(unknown[0])}: it takes {', '.join(cls.names())}; remove it "
                "from the config, or load with the release that wrote it."
            )
        try:
            return cls(**(stored or {}))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def for_layer(self, index: int | None) -> Options:
        """The options of layer `index` of a model; `index` may be None where no option of `by_layer` is set."""
        return self

    def _positive(self, *names: str) -> None:
        self._between(1, MOST_TOKENS, *names)

    def _between(self, least: int, most: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"{name}={shown(value)}: a whole number of at least {least} is needed, or None for the default."
                )
            if value > most:
                raise ValueError(f"{name}={shown(value)}: at most {most} is allowed.")

    def _check_kernel(self, name: Any) -> None:
        if name is not None and (not isinstance(name, str) or name not in KERNELS):
            raise ValueError(f"kernel={shown(name)} is unknown: choose one of {', '.join(KERNELS)}, or None.")


@dataclass(frozen=True)
class OfLayer(Options):
    """The options of a row that only has to know which layer a call comes from: probes, and sessions over ranks."""

    by_layer = ("layer",)

    layer: int | None = None

    def for_layer(self, index: int | None) -> OfLayer:
        """The options of layer `index`."""
        return OfLayer(index)


def _plain(value: Any) -> Any:
    """Tuples as lists: what a JSON file gives back."""
    return [_plain(each) for each in value] if isinstance(value, tuple) else value


def shown(value: Any) -> str:
    """A value for an error message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
