"""A checkpoint's own choice of attention, kept when a model that was loaded from it is saved again.

Transformers follows `attn_implementation` in config.json, and leaves it out of every config that it writes. So
`hf-attn patch set-attention` writes the choice a second time, in a field that Transformers keeps as it keeps every one
that it does not know. While a config with this field is saved, the attribute `attn_implementation` is set, and written
like any other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from hf_attn_plugins.plugins import PLUGINS

FIELD = "hf_attn_plugins_choice"


def choice_of(config: Any) -> str | dict[str, str] | None:
    """What a patch has chosen for a config, a name or names by part; None where nothing was, or something else runs."""
    from hf_attn_plugins.hf.compat import implementation_of

    choice = getattr(config, FIELD, None)
    for part, name in choice.items() if isinstance(choice, dict) else [("", choice)]:
        target = getattr(config, part, None) if part else config
        if not isinstance(name, str) or name not in PLUGINS or target is None or implementation_of(target) != name:
            return None
    return choice


def keep() -> None:
    """Let `PreTrainedConfig.save_pretrained`, and with it a model's, write what a patch has chosen. Idempotent."""
    from transformers import PreTrainedConfig

    if not hasattr(PreTrainedConfig.save_pretrained, "forget_choice"):
        PreTrainedConfig.save_pretrained = _keeping(PreTrainedConfig.save_pretrained)  # type: ignore[method-assign]


def forget() -> None:
    """Undo `keep`."""
    from transformers import PreTrainedConfig

    plain = getattr(PreTrainedConfig.save_pretrained, "forget_choice", None)
    if plain is not None:
        PreTrainedConfig.save_pretrained = plain  # type: ignore[method-assign]


def _keeping(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        choice = choice_of(self)
        if choice is None or "attn_implementation" in vars(self):
            return save(self, *args, **kwargs)
        self.attn_implementation = choice
        try:
            return save(self, *args, **kwargs)
        finally:
            del self.attn_implementation

    save_pretrained.forget_choice = save  # type: ignore[attr-defined]
    return save_pretrained
