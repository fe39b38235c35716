"""The base of a method's options: a frozen dataclass, stored as a plain dict in `config.hf_attn_plugins`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

# The kernels of `kernels.choose`, by name; they stand here because options are checked before any kernel is imported.
KERNELS = ("reference", "aten", "cpu_tiled", "cpu_fused", "triton")


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

    def _check_kernel(self, name: str | None) -> None:
        if name is not None and name not in KERNELS:
            raise ValueError(f"kernel={name!r} is unknown: choose one of {', '.join(KERNELS)}, or None.")
