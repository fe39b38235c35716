"""The private name of Python's importlib that this package leans on; apart from `compat`, because it needs no torch."""

from __future__ import annotations

from types import ModuleType


def is_being_imported(module: ModuleType | None) -> bool:
    """Whether a module in `sys.modules` is still running its own code (`__spec__._initializing` of importlib).

    Where importlib has no such mark, a module counts as imported, as `importlib` itself then assumes.
    """
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))
