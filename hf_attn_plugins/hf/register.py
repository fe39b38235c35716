"""Registration: the plugin table made known to Transformers, and taken out again."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

from hf_attn_plugins.hf.import_hooks import forget, when_imported
from hf_attn_plugins.plugins import PLUGINS, Plugin, resolve

MODELING = "transformers.modeling_utils"
# Once the module on the left has been imported, the function on the right is called.
REGISTRATIONS = (
    (MODELING, "hf_attn_plugins.hf.register:register_attention"),
    ("transformers.pipelines", "hf_attn_plugins.star.hf.pipeline:register_pipeline"),
    ("transformers.models.auto.configuration_auto", "hf_attn_plugins.indexed.hf.config:register"),
    ("transformers.models.auto.modeling_auto", "hf_attn_plugins.indexed.hf.model:register"),
    ("transformers.quantizers.auto", "hf_attn_plugins.checkpoint.loader:register"),
)
_BUILT_IN = frozenset(PLUGINS)


def register() -> None:
    """Make everything of this package known to Transformers, each part as soon as it is imported. Idempotent."""
    for module, action in REGISTRATIONS:
        when_imported(module, functools.partial(_call, action))


def register_plugin(plugin: Plugin) -> None:
    """Add a row to the plugin table and make its name known to Transformers; `unregister(plugin.name)` undoes it.

    Args:
        plugin: the new row; its `entry` and `options` may be objects instead of "module:name".

    Raises:
        ValueError: the name is taken, or Transformers would treat it in a way of its own.
    """
    from hf_attn_plugins.hf.compat import registered_names

    special = [part for part in ("flash", "sdpa", "flex_attention", "/", "|") if part in plugin.name]
    if special or not plugin.name:
        raise ValueError(
            f"{plugin.name!r} cannot name a plugin: Transformers treats names with {', '.join(map(repr, special))} in "
            "ways of its own; choose another name, such as 'my_attention'."
        )
    if plugin.name in PLUGINS or plugin.name == "eager" or plugin.name in registered_names():
        raise ValueError(f"the name {plugin.name!r} is taken: unregister({plugin.name!r}) first, or choose another.")
    plugin.attention(), plugin.options_type()  # a row that names nothing fails here, not at the first call
    PLUGINS[plugin.name] = plugin
    if MODELING in sys.modules:
        install(plugin)


def unregister(name: str | None = None) -> None:
    """Take one attention implementation, or all of this package's (None), out of Transformers again.

    A row that `register_plugin` added also leaves the table; the package's own rows stay in it, for `register()`.

    Raises:
        ValueError: there is no plugin of this name.
    """
    if name is not None and name not in PLUGINS:
        raise ValueError(f"{name!r} is no plugin of hf_attn_plugins: choose one of {', '.join(PLUGINS)}.")
    if name is None:
        for module, _ in REGISTRATIONS:
            forget(module)
    for each in list(PLUGINS) if name is None else [name]:
        if MODELING in sys.modules:
            remove(each)
        if each not in _BUILT_IN:
            del PLUGINS[each]


@contextlib.contextmanager
def registered(*plugins: Plugin) -> Iterator[None]:
    """`register_plugin` for a while; afterwards neither the table nor Transformers knows the plugins."""
    with contextlib.ExitStack() as stack:
        for plugin in plugins:
            register_plugin(plugin)
            stack.callback(unregister, plugin.name)
        yield


@contextlib.contextmanager
def installed(plugin: Plugin, mask_function: Callable[..., Any]) -> Iterator[None]:
    """`attn_implementation=plugin.name` for a while, with another mask function and without a row in the table."""
    install(plugin, mask_function)
    try:
        yield
    finally:
        remove(plugin.name)


def register_attention() -> None:
    """Install every plugin of the table.

    Raises:
        ImportError: Transformers is older than this package supports.
    """
    import transformers

    from hf_attn_plugins.hf.compat import refuse_old

    refuse_old(transformers.__version__)  # first: older versions lack what is imported next
    for plugin in PLUGINS.values():
        install(plugin)


def install(plugin: Plugin, mask_function: Callable[..., Any] | None = None) -> None:
    """Register a plugin's attention function and a mask function (the structured one when None) under its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from hf_attn_plugins.hf.interface import attention_function
    from hf_attn_plugins.hf.mask_function import mask_function as structured

    # Both under one name: without a mask function Transformers hands over None and padding is lost silently.
    AttentionInterface.register(plugin.name, attention_function(plugin))
    AttentionMaskInterface.register(plugin.name, mask_function or structured)


def remove(name: str) -> None:
    """Take a name out of Transformers' two registries."""
    from hf_attn_plugins.hf.compat import forget_attention

    forget_attention(name)


def _call(action: str) -> None:
    resolve(action)()
