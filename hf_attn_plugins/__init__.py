"""Long-context attention as plugins for Hugging Face Transformers.

Importing this package registers its attention implementations by name; see `plugins()` for the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_attn_plugins._version import __version__ as __version__
from hf_attn_plugins.core.lazy import lazy
from hf_attn_plugins.hf.register import register, register_plugin, unregister
from hf_attn_plugins.plugins import PLUGINS, Plugin

if TYPE_CHECKING:
    from hf_attn_plugins import cqs, indexed, kernels, parallel, star, tiled
    from hf_attn_plugins.hf.check import check
    from hf_attn_plugins.hf.compare import compare
    from hf_attn_plugins.hf.configure import configure, use
    from hf_attn_plugins.hf.inputs.load import demo_folder
    from hf_attn_plugins.hf.intercept import intercept
    from hf_attn_plugins.hf.trace import trace
    from hf_attn_plugins.hf.tune import tune
    from hf_attn_plugins.parallel.hf.session import context_parallel

__all__ = [
    "PLUGINS",
    "Plugin",
    "check",
    "compare",
    "configure",
    "context_parallel",
    "cqs",
    "demo_folder",
    "indexed",
    "intercept",
    "kernels",
    "parallel",
    "plugins",
    "register",
    "register_plugin",
    "star",
    "tiled",
    "trace",
    "tune",
    "unregister",
    "use",
]

# Verbs and method folders are imported on first use, which keeps `import hf_attn_plugins` as cheap as its registration.
_VERBS = {
    "check": "hf.check",
    "compare": "hf.compare",
    "configure": "hf.configure",
    "context_parallel": "parallel.hf.session",
    "demo_folder": "hf.inputs.load",
    "intercept": "hf.intercept",
    "trace": "hf.trace",
    "tune": "hf.tune",
    "use": "hf.configure",
}
_FOLDERS = ("cqs", "indexed", "kernels", "parallel", "star", "tiled")
__getattr__, __dir__ = lazy(
    __name__,
    {name: f"{__name__}.{module}:{name}" for name, module in _VERBS.items()}
    | {name: f"{__name__}.{name}" for name in _FOLDERS},
)


def plugins() -> list[Plugin]:
    """The attention implementations that can be named, as rows of the table that README and command line show."""
    return list(PLUGINS.values())


register()
