"""Names of a package that are imported on first use, so that `import` stays cheap and Tab still shows them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def lazy(package: str, table: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        table: name -> "module:name", or "module" where the name is the module itself.

    Example:
        __getattr__, __dir__ = lazy(__name__, {"encode": "hf_attn_plugins.star.hf.encode:encode"})
    """
    namespace = vars(sys.modules[package])

    def get(name: str) -> Any:
        if name not in table:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = table[name].partition(":")
        value: Any = importlib.import_module(module)
        namespace[name] = value = getattr(value, attribute) if attribute else value
        return value

    def names() -> list[str]:
        return sorted({*(n for n in namespace.get("__all__", ())), *table, "__doc__", "__name__", "__version__"})

    return get, names
