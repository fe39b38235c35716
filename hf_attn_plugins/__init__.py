"""Long-context attention as plugins for Hugging Face Transformers.

Importing this package registers its attention implementations by name; see `plugins()` for the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_attn_plugins._version import __version__ as __version__
from hf_attn_plugins.core.lazy import lazy
from hf_attn_plugins.hf.register import register, register_plugin, unregister
from hf_attn_plugins.plugins import PLUGINS, Plugin, PluginTable

if TYPE_CHECKING:
    from hf_attn_plugins import cqs, indexed, kernels, parallel, star, tiled
    from hf_attn_plugins.hf.check import check
    from hf_attn_plugins.hf.compare import compare, compare_all
    from hf_attn_plugins.hf.configure import configure, use
    from hf_attn_plugins.hf.continuous import continuous_batching
    from hf_attn_plugins.hf.inputs.load import demo_folder
    from hf_attn_plugins.hf.intercept import intercept
    from hf_attn_plugins.hf.trace import trace
    from hf_attn_plugins.hf.tune import tune
    from hf_attn_plugins.parallel.hf.context_parallel import context_parallel

__all__ = [
    "PLUGINS",
    "Plugin",
    "check",
    "compare",
    "compare_all",
    "configure",
    "context_parallel",
    "continuous_batching",
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
    "compare_all": "hf.compare",
    "configure": "hf.configure",
    "context_parallel": "parallel.hf.context_parallel",
    "continuous_batching": "hf.continuous",
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


def plugins() -> PluginTable:
    """The attention implementations that can be named: a list of the table's rows, which prints as the table."""
    return PluginTable(PLUGINS.values())


register()
