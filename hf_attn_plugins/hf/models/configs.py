"""The configs of a model: its own and those of its parts."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_attn_plugins.hf.compat import has_implementation


def configs_of(model: nn.Module) -> list[Any]:
    """Every distinct config in a model, sub-configs of composite models included."""
    seen: dict[int, Any] = {}

    def visit(config: Any) -> None:
        if config is None or id(config) in seen or not has_implementation(config):
            return
        seen[id(config)] = config
        for name in getattr(config, "sub_configs", {}):
            visit(getattr(config, name, None))

    for module in model.modules():
        visit(getattr(module, "config", None))
    return list(seen.values())
