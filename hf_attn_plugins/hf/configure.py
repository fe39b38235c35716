"""`configure` and `use`: set a plugin and its options on a loaded model, for good or for a while."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from hf_attn_plugins.hf.compat import has_implementation, implementation_of, set_implementation
from hf_attn_plugins.hf.known_good import refuse_unless_good
from hf_attn_plugins.hf.models.configs import configs_of
from hf_attn_plugins.hf.models.loading import unknown_name
from hf_attn_plugins.hf.models.unwrap import language_model, unwrapped
from hf_attn_plugins.hf.saved_choice import FIELD
from hf_attn_plugins.plugins import PLUGINS, plugin
from hf_attn_plugins.ui.suggest import did_you_mean

logger = logging.getLogger("hf_attn_plugins")


def configure(model: nn.Module, name: str, *, activate: bool = False, **options: Any) -> None:
    """Store options of plugin `name` in the model's configs, where they are saved and loaded with the model.

    Options that are not named keep the value they have; a value of None restores the default. Wrappers such as
    DistributedDataParallel are looked through (`hf.unwrap`).

    Args:
        activate: True also switches the model to the plugin, and lets `save_pretrained` keep the name: who loads the
            saved model has to import this package. False stores options only; the model runs the plugin after
            `model.set_attn_implementation(name)` or inside `use`, and a saved model does not name it.

    Raises:
        ValueError: an unknown plugin, option or value, or, with `activate`, a model in which the plugin could not take
            effect; nothing has been changed then.
    """
    plugin(name)
    inner: Any = language_model(model) if activate else unwrapped(model)
    if activate:
        refuse_unless_good(inner, name)
    store(inner, name, options)
    if activate:
        inner.set_attn_implementation(name)
        setattr(inner.config, FIELD, name)
    elif has_implementation(getattr(inner, "config", None)) and (runs := implementation_of(inner.config)) != name:
        logger.info("options of %s are stored, and the model still runs %s; activate=True switches.", name, runs)


def store(model: nn.Module, name: str, options: Mapping[str, Any]) -> None:
    """Write options of a plugin into every config of a model.

    Raises:
        ValueError: an unknown plugin, option or value; nothing has been changed then.
    """
    chosen = plugin(name)
    fields = chosen.options_type().names()
    unknown = sorted(set(options) - set(fields))
    if unknown:
        hint = did_you_mean(unknown[0], fields)
        raise ValueError(f"{name} has no option {', '.join(unknown)}{hint}: it takes {', '.join(fields)}.")
    changes = []
    for config in configs_of(model):
        stored = getattr(config, "hf_attn_plugins", None)
        stored = {} if stored is None else stored
        where = f"hf_attn_plugins in {type(config).__name__}"
        if not isinstance(stored, Mapping):
            raise ValueError(f"{where} is {str(stored)[:80]!r}: a mapping of plugin names to options is needed.")
        known = chosen.options_type().of(stored.get(name), f"{where}, {name}").as_dict()
        changes.append((config, {**stored, name: chosen.options_type()(**{**known, **options}).as_dict()}))
    for config, stored in changes:
        config.hf_attn_plugins = stored


@contextlib.contextmanager
def use(model: nn.Module, name: str, **options: Any) -> Iterator[nn.Module]:
    """Run a model with another attention implementation, restoring names and options of every config afterwards.

    Args:
        model: a model of Transformers, or a wrapper around one (`hf.unwrap`); it is what `with ... as` gives.
        name: a plugin, or any implementation that Transformers knows ("sdpa", "eager", ...), then without options.
        options: of the plugin, beside those that the model's config holds.

    Raises:
        ValueError: an option the plugin does not have, or a model in which the plugin could not take effect.
    """
    inner = language_model(model)
    configs = configs_of(inner)
    before = [(c, implementation_of(c), copy.deepcopy(getattr(c, "hf_attn_plugins", None))) for c in configs]
    try:
        if name in PLUGINS:
            refuse_unless_good(inner, name)
            store(inner, name, options)
        elif options:
            hint = did_you_mean(name, PLUGINS)
            raise ValueError(f"options {sorted(options)} were given for {name!r}, which is no plugin{hint}.")
        _set(inner, name)
        yield model
    finally:
        for config, implementation, stored in before:
            set_implementation(config, implementation)
            if stored is not None:
                config.hf_attn_plugins = stored
            elif hasattr(config, "hf_attn_plugins"):
                del config.hf_attn_plugins


def _set(model: Any, name: str) -> None:
    try:
        model.set_attn_implementation(name)
    except ValueError as error:
        more = unknown_name(error)
        if more is None:
            raise
        raise ValueError(f"{error} {more}") from error
