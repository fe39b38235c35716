"""One sentence more in Transformers' error where a plugin is named in continuous batching: what to do instead."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from hf_attn_plugins.plugins import EXACT, PLUGINS

_METHOD = "switch_to_cb_friendly_attn"  # raises for names that continuous batching does not take


def add_hint() -> None:
    """Complete the error, where this version of Transformers has it. Idempotent."""
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    method = getattr(ContinuousBatchingManager, _METHOD, None)
    if method is not None and not hasattr(method, "forget_hint"):
        setattr(ContinuousBatchingManager, _METHOD, _hinting(method))


def forget() -> None:
    """Undo `add_hint`."""
    from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

    plain = getattr(getattr(ContinuousBatchingManager, _METHOD, None), "forget_hint", None)
    if plain is not None:
        setattr(ContinuousBatchingManager, _METHOD, plain)


def _hinting(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def switch(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, model, *args, **kwargs)
        except ValueError as error:
            name = model.config._attn_implementation
            if name not in PLUGINS:
                raise
            raise ValueError(
                f"{error} For hf_attn_plugins: `with hap.continuous_batching(model): model.generate_batch(...)` runs "
                f"{EXACT} there" + (f"; {name} has no plan for many sequences in one call." if name != EXACT else ".")
            ) from error

    switch.forget_hint = method  # type: ignore[attr-defined]
    return switch
