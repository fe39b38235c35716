"""Long-context attention as plugins for Hugging Face Transformers.

Importing this package registers its attention implementations by name; see `plugins()` for the table.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_attn_plugins.registry import PLUGINS, Plugin, register, unregister

if TYPE_CHECKING:
    from hf_attn_plugins.agreement import compare
    from hf_attn_plugins.interception import intercept
    from hf_attn_plugins.parallel_session import context_parallel
    from hf_attn_plugins.support import check
    from hf_attn_plugins.switch import configure, use

__version__ = "0.1.0"
__all__ = [
    "PLUGINS",
    "Plugin",
    "check",
    "compare",
    "configure",
    "context_parallel",
    "intercept",
    "plugins",
    "register",
    "unregister",
    "use",
]

# Verbs and method folders are imported on first use, which keeps `import hf_attn_plugins` as cheap as its registration.
_VERBS = {
    "check": "support",
    "compare": "agreement",
    "configure": "switch",
    "context_parallel": "parallel_session",
    "intercept": "interception",
    "use": "switch",
}
_FOLDERS = ("cqs", "indexed", "kernels", "parallel", "star", "tiled")


def plugins() -> list[Plugin]:
    """The attention implementations of this package, as rows of the table that README and command line show."""
    return list(PLUGINS.values())


def __getattr__(name: str) -> Any:
    if name in _VERBS:
        value = getattr(importlib.import_module(f"{__name__}.{_VERBS[name]}"), name)
    elif name in _FOLDERS:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


register()
