"""Registration: the plugin table made known to Transformers, and taken out again."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from hf_attn_plugins.core.imports import is_being_imported
from hf_attn_plugins.core.options import Options
from hf_attn_plugins.hf import batching_hint, saved_choice
from hf_attn_plugins.hf.import_hooks import forget, is_waiting, when_imported
from hf_attn_plugins.plugins import PLUGINS, Plugin, resolve
from hf_attn_plugins.plugins import plugin as find

MODELING = "transformers.modeling_utils"
CONFIGS = "transformers.configuration_utils"
BATCHING = "transformers.generation.continuous_batching.continuous_api"
# Once the module on the left has been imported, the function on the right is called.
REGISTRATIONS = (
    (MODELING, "hf_attn_plugins.hf.register:register_attention"),
    (CONFIGS, "hf_attn_plugins.hf.saved_choice:keep"),
    (BATCHING, "hf_attn_plugins.hf.batching_hint:add_hint"),
    ("transformers.pipelines", "hf_attn_plugins.star.hf.pipeline:register_pipeline"),
    ("transformers.models.auto.configuration_auto", "hf_attn_plugins.indexed.hf.config:register"),
    ("transformers.models.auto.modeling_auto", "hf_attn_plugins.indexed.hf.model:register"),
    ("transformers.quantizers.auto", "hf_attn_plugins.checkpoint.loader:register"),
)
_BUILT_IN = frozenset(PLUGINS)
_WITHDRAWN: set[str] = set()  # own plugins that were unregistered, maybe before Transformers' modeling code was there
_NAME = re.compile(r"[A-Za-z][\w.-]*", re.ASCII)
_SPECIAL = ("flash", "sdpa", "flex_attention")


def register() -> None:
    """Make everything of this package known to Transformers, each part as soon as it is imported. Idempotent."""
    _WITHDRAWN.clear()
    for module, action in REGISTRATIONS:
        when_imported(module, functools.partial(_call, action))


def register_plugin(plugin: Plugin) -> None:
    """Add a row to the plugin table and make its name known to Transformers; `unregister(plugin.name)` undoes it.

    The row lives in this process only. Transformers' modeling code is not imported for it: where it is not there yet,
    the name is registered together with the package's own.

    Args:
        plugin: the new row; its `entry` and `options` may be objects instead of "module:name".

    Raises:
        ValueError: the name is taken, or has a meaning of its own to Transformers or to the command line; or the row
            names something that cannot be imported, or options that are not a dataclass with defaults.
    """
    check_name(plugin)
    check_row(plugin)
    if MODELING in sys.modules or not is_waiting(MODELING):
        install(plugin)
    PLUGINS[plugin.name] = plugin


def unregister(name: str | None = None) -> None:
    """Take one attention implementation, or all of this package's (None), out of Transformers again.

    A row that `register_plugin` added also leaves the table; the package's own rows stay in it, for `register()`.

    Raises:
        ValueError: there is no plugin of this name.
    """
    if name is not None:
        find(name)
    if name is None:
        for module, _ in REGISTRATIONS:
            forget(module)
        if CONFIGS in sys.modules:
            saved_choice.forget()
        if MODELING in sys.modules:
            from hf_attn_plugins.hf.models import loading

            loading.forget()
        if BATCHING in sys.modules:
            batching_hint.forget()
    for each in list(PLUGINS) if name is None else [name]:
        if MODELING in sys.modules:
            remove(each)
        if each in _BUILT_IN:
            _WITHDRAWN.add(each)
        else:
            del PLUGINS[each]


def check_name(plugin: Plugin) -> None:
    """Raise ValueError for a name that cannot be a plugin's: of another form, special to Transformers, or taken."""
    name = plugin.name
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name a plugin: a name is letters, digits, '_', '-' and '.', and begins with a letter "
            "('/' and '|' have a meaning to Transformers; ',', ':' and '=' to `hf-attn eval --attn`)."
        )
    special = [part for part in _SPECIAL if part in name]
    if special:
        raise ValueError(
            f"{name!r} cannot name a plugin: Transformers treats names with {', '.join(map(repr, special))} in "
            "ways of its own; choose another name, such as 'my_attention'."
        )
    if name in _BUILT_IN:
        raise ValueError(f"the name {name!r} is taken by a plugin of this package: choose another.")
    if name in PLUGINS:
        raise ValueError(f"the name {name!r} is taken by a plugin: unregister({name!r}) first, or choose another.")
    if name == "eager" or (MODELING in sys.modules and _known_to_transformers(name)):
        raise ValueError(f"the name {name!r} is taken by an attention of Transformers' registry: choose another.")
    same = [row.name for row in PLUGINS.values() if row.short == plugin.short]
    if same:
        raise ValueError(f"{name!r} and {same[0]!r} are both {plugin.short!r} on the command line: choose another.")


def check_row(plugin: Plugin) -> None:
    """Raise ValueError for a row that would fail later: at the first call, or in `hf-attn list`."""
    for field in ("entry", "options", "decide", "ranks", "command", "bench"):
        named = getattr(plugin, field)
        if named is None:
            continue
        try:
            found = importlib.import_module(named) if field in ("command", "bench") else resolve(named)
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"plugin {plugin.name!r}: {field}={named!r} cannot be imported: {error}.") from error
        if field in ("entry", "decide", "ranks") and not callable(found):
            raise ValueError(f"plugin {plugin.name!r}: {field}={named!r} is no function or class.")
    kind = plugin.options_type()
    if not (isinstance(kind, type) and issubclass(kind, Options) and dataclasses.is_dataclass(kind)):
        raise ValueError(
            f"plugin {plugin.name!r}: options={plugin.options!r} must be a dataclass derived from "
            "hf_attn_plugins.core.options.Options."
        )
    required = [
        f.name for f in dataclasses.fields(kind) if f.init and f.default is f.default_factory is dataclasses.MISSING
    ]
    if required:
        raise ValueError(f"plugin {plugin.name!r}: option {', '.join(required)} needs a default.")


def _known_to_transformers(name: str) -> bool:
    from hf_attn_plugins.hf.compat import registered_names

    return name in registered_names()


@contextlib.contextmanager
def registered(*plugins: Plugin) -> Iterator[None]:
    """`register_plugin` for a while; afterwards neither the table nor Transformers knows the plugins."""
    with contextlib.ExitStack() as stack:
        for plugin in plugins:
            register_plugin(plugin)
            stack.callback(_unregister_if_there, plugin)
        yield


@contextlib.contextmanager
def installed(plugin: Plugin, mask_function: Callable[..., Any]) -> Iterator[None]:
    """`attn_implementation=plugin.name` for a while, with another mask function and without a row in the table."""
    install(plugin, mask_function)
    try:
        yield
    finally:
        remove(plugin.name)


def _unregister_if_there(plugin: Plugin) -> None:
    if PLUGINS.get(plugin.name) is plugin:
        unregister(plugin.name)


def register_attention() -> None:
    """Install every plugin of the table, except those that `unregister` has taken out since.

    Raises:
        ImportError: Transformers is older than this package supports.
    """
    import transformers

    from hf_attn_plugins.hf.compat import refuse_old
    from hf_attn_plugins.hf.models import loading

    refuse_old(transformers.__version__)  # first: older versions lack what is imported next
    for plugin in PLUGINS.values():
        if plugin.name not in _WITHDRAWN:
            install(plugin)
    loading.watch()


def install(plugin: Plugin, mask_function: Callable[..., Any] | None = None) -> None:
    """Register a plugin's attention function and a mask function (the structured one when None) under its name."""
    from transformers import AttentionInterface, AttentionMaskInterface

    from hf_attn_plugins.hf.calls.interface import attention_function
    from hf_attn_plugins.hf.masks.mask_function import mask_function as structured

    # Both under one name: without a mask function Transformers hands over None and padding is lost silently.
    AttentionInterface.register(plugin.name, attention_function(plugin))
    AttentionMaskInterface.register(plugin.name, mask_function or structured)


def remove(name: str) -> None:
    """Take a name out of Transformers' two registries."""
    from hf_attn_plugins.hf.compat import forget_attention

    forget_attention(name)


def _call(action: str) -> None:
    module, _, name = action.partition(":")
    found = sys.modules.get(module)
    if is_being_imported(found) and not hasattr(found, name):
        return  # this import is what brought Transformers' module: the last line of ours registers
    resolve(action)()
