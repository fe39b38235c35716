"""Models that `check` has passed, so that `use` in a loop does not run a dry forward in every round.

A verdict is kept while everything it came from is the same: the plugin's row, the configs, every module's class and
simple attributes, every parameter's shape and dtype. Only "ok" is kept; a refusal is looked for again.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

from torch import nn

from hf_attn_plugins.hf.check import check
from hf_attn_plugins.hf.models.configs import configs_of
from hf_attn_plugins.plugins import plugin

_PASSED: weakref.WeakKeyDictionary[nn.Module, dict[str, Hashable]] = weakref.WeakKeyDictionary()
_SIMPLE = (bool, int, float, str, type(None))


def refuse_unless_good(model: nn.Module, name: str) -> None:
    """`check(model, name).raise_if_refused()`, not asked again while nothing has changed.

    Raises:
        ValueError: an unknown plugin, or a model in which it could not take effect.
    """
    origin = _origin(model, name)
    passed = _PASSED.setdefault(model, {})
    if origin is not None and passed.get(name) == origin:
        return
    passed.pop(name, None)
    check(model, name).raise_if_refused()
    if origin is not None:
        passed[name] = origin


def _origin(model: nn.Module, name: str) -> Hashable | None:
    """What the verdict comes from; None where that cannot be told: a module whose own forward was replaced.

    Nothing in it refers to the model, which would then never be freed.
    """
    modules = list(model.named_modules())
    if any("forward" in vars(module) for _, module in modules):
        return None
    shapes = tuple((key, x.shape, x.dtype) for key, x in model.named_parameters())
    configs = tuple(repr(config.to_dict()) for config in configs_of(model))
    return repr(plugin(name)), configs, shapes, tuple((key, _kind(module)) for key, module in modules)


def _kind(module: Any) -> Hashable:
    simple = tuple((key, value) for key, value in vars(module).items() if isinstance(value, _SIMPLE))
    return type(module), type(module).forward, hasattr(module, "_hf_hook"), simple
