"""Another attention implementation for a while, whatever `check` says."""

from __future__ import annotations

from typing import Any

from hf_attn_plugins.hf import compat
from hf_attn_plugins.hf.models.configs import configs_of


class implementation:  # a context manager, named as what it sets
    """Another attention implementation for a while, without check."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    def __enter__(self) -> None:
        self.before = [(c, compat.implementation_of(c)) for c in configs_of(self.model)]
        self.model.set_attn_implementation(self.name)

    def __exit__(self, *_: object) -> None:
        for config, name in self.before:
            compat.set_implementation(config, name)
