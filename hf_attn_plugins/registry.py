"""The plugin table, and its registration into Transformers: everything that lists plugins reads `PLUGINS`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_attn_plugins.options import Options

MODELING = "transformers.modeling_utils"


@dataclass(frozen=True)
class Plugin:
    """One attention implementation that Transformers can be asked for by name.

    Attributes:
        name: what goes into `attn_implementation=`.
        summary: one line on what it does.
        exact: whether its outputs equal the default backend's up to rounding.
        source: where the method comes from.
        entry: "module:function" of the method's `attention`, imported on first use.
        options: name of the options' dataclass in `options.py`.
    """

    name: str
    summary: str
    exact: bool
    source: str
    entry: str
    options: str

    def attention(self) -> Callable[..., Any]:
        """The method's function: (query, key, value, mask, *, scale, softcap, dropout, options) -> Partial."""
        module, function = self.entry.split(":")
        return getattr(importlib.import_module(module), function)

    def options_type(self) -> type[Options]:
        """The dataclass that validates this plugin's options."""
        return getattr(importlib.import_module("hf_attn_plugins.options"), self.options)


PLUGINS: dict[str, Plugin] = {
    plugin.name: plugin
    for plugin in (
        Plugin(
            name="tiled_attention",
            summary="FlashAttention-style tiles: never holds a score matrix; bfloat16 products on CPUs",
            exact=True,
            source="FlashAttention, arXiv 2205.14135 and 2307.08691",
            entry="hf_attn_plugins.tiled:attention",
            options="TiledOptions",
        ),
    )
}


def plugin(name: str) -> Plugin:
    """The plugin called `name`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in PLUGINS:
        raise ValueError(f"{name!r} is no plugin of hf_attn_plugins: choose one of {', '.join(PLUGINS)}.")
    return PLUGINS[name]


def register() -> None:
    """Make every plugin known to Transformers, now or as soon as its modeling code is imported. Idempotent."""
    if getattr(sys.modules.get(MODELING), "AttentionInterface", None) is not None:
        _register_now()
    elif not any(isinstance(finder, _AfterModeling) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterModeling())


def unregister() -> None:
    """Take every plugin out of Transformers again."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _AfterModeling)]
    if MODELING in sys.modules:
        from transformers import AttentionInterface, AttentionMaskInterface

        for name in PLUGINS:
            AttentionInterface._global_mapping.pop(name, None)
            AttentionMaskInterface._global_mapping.pop(name, None)


def _register_now() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    from hf_attn_plugins.interface import attention_function
    from hf_attn_plugins.structure import mask_function

    for name in PLUGINS:
        # Both under one name: without a mask function Transformers hands over None and padding is lost silently.
        AttentionInterface.register(name, attention_function(name))
        AttentionMaskInterface.register(name, mask_function)


class _AfterModeling(MetaPathFinder):
    """Registers right after `transformers.modeling_utils` was imported: importing it now would double import time."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != MODELING:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


class _RegisteringLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register_now()
