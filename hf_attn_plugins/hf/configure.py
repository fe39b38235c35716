"""`configure` and `use`: set a plugin and its options on a loaded model, for good or for a while."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from hf_attn_plugins.hf.compat import implementation_of, set_implementation
from hf_attn_plugins.hf.known_good import refuse_unless_good
from hf_attn_plugins.hf.models.configs import configs_of
from hf_attn_plugins.hf.models.unwrap import language_model, unwrapped
from hf_attn_plugins.plugins import PLUGINS, plugin


def configure(model: nn.Module, name: str, **options: Any) -> None:
    """Store options of plugin `name` in the model's configs, where they are saved and loaded with the model.

    Options that are not named keep the value they have; a value of None restores the default. The attention
    implementation itself is not changed (`model.set_attn_implementation(name)` or `use` do that). Wrappers such as
    DistributedDataParallel are looked through (`hf.unwrap`).

    Raises:
        ValueError: an unknown plugin, option or value; nothing has been changed then.
    """
    chosen, model = plugin(name), unwrapped(model)
    fields = chosen.options_type().names()
    unknown = sorted(set(options) - set(fields))
    if unknown:
        raise ValueError(f"{name} has no option {', '.join(unknown)}: it takes {', '.join(fields)}.")
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

    Raises:
        ValueError: an option the plugin does not have, or a model in which the plugin could not take effect.
    """
    inner = language_model(model)
    configs = configs_of(inner)
    before = [(c, implementation_of(c), copy.deepcopy(getattr(c, "hf_attn_plugins", None))) for c in configs]
    try:
        if name in PLUGINS:
            refuse_unless_good(inner, name)
            configure(inner, name, **options)
        elif options:
            raise ValueError(f"options {sorted(options)} were given for {name!r}, which is no plugin.")
        inner.set_attn_implementation(name)
        yield model
    finally:
        for config, implementation, stored in before:
            set_implementation(config, implementation)
            if stored is not None:
                config.hf_attn_plugins = stored
            elif hasattr(config, "hf_attn_plugins"):
                del config.hf_attn_plugins
