"""What `from_pretrained` says of this package's attentions: options that do not run, and names that were misspelt.

`PreTrainedModel.from_pretrained` is wrapped when the attentions are registered and unwrapped when all are unregistered.
It loads what it always loads; only the log and the text of one error are new.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import re
from collections.abc import Iterator, Mapping
from typing import Any

from hf_attn_plugins.hf.compat import has_implementation, implementation_of, registered_names
from hf_attn_plugins.hf.models.configs import configs_of
from hf_attn_plugins.plugins import PLUGINS
from hf_attn_plugins.ui.suggest import did_you_mean

logger = logging.getLogger("hf_attn_plugins")
_quiet = 0


def watch() -> None:
    """Let `PreTrainedModel.from_pretrained` say what it does not run. Idempotent."""
    from transformers import PreTrainedModel

    plain = vars(PreTrainedModel)["from_pretrained"]
    if not hasattr(plain.__func__, "unwatched"):
        PreTrainedModel.from_pretrained = _watched(plain)  # type: ignore[method-assign]


def forget() -> None:
    """Undo `watch`."""
    from transformers import PreTrainedModel

    plain = getattr(vars(PreTrainedModel)["from_pretrained"].__func__, "unwatched", None)
    if plain is not None:
        PreTrainedModel.from_pretrained = plain  # type: ignore[method-assign]


@contextlib.contextmanager
def without_warning() -> Iterator[None]:
    """Load without the warning: for whoever sets another attention on purpose."""
    global _quiet
    _quiet += 1
    try:
        yield
    finally:
        _quiet -= 1


def unused_options(model: Any) -> str | None:
    """The warning for a model whose config holds options of plugins while another attention runs; else None."""
    for config in configs_of(model):
        stored, runs = getattr(config, "hf_attn_plugins", None), implementation_of(config)
        if not isinstance(stored, Mapping) or runs in PLUGINS:
            continue
        names = [name for name, options in stored.items() if name in PLUGINS and options]
        if names:
            return (
                f"{type(model).__name__} runs {runs}, although its config holds options of {' and '.join(names)}: "
                f"model.set_attn_implementation({names[0]!r}) switches. save_pretrained keeps the name after "
                f"hap.configure(model, {names[0]!r}, activate=True)."
            )
    return None


def unknown_name(error: Exception) -> str | None:
    """What to add to Transformers' error for an attention that it does not know; None for another error."""
    found = re.search(r"`?attn_implementation=\"([^\"]+)\"` is not supported", str(error))
    if found is None or "hf_attn_plugins" in str(error):
        return None
    hint = did_you_mean(found[1], list(dict.fromkeys([*PLUGINS, *sorted(registered_names())])))
    return f"Attentions of hf_attn_plugins: {', '.join(PLUGINS)}{hint}."


def _watched(plain: Any) -> Any:
    load = plain.__func__

    @functools.wraps(load)
    def from_pretrained(cls: Any, *args: Any, **kwargs: Any) -> Any:
        named = kwargs.get("attn_implementation") is not None
        config = kwargs.get("config")
        if has_implementation(config):  # what an Auto class has put there
            named = named or implementation_of(config) is not None
        try:
            loaded = load(cls, *args, **kwargs)
        except ValueError as error:
            more = unknown_name(error)
            if more is None:
                raise
            raise ValueError(f"{error} {more}") from error
        if not named and not _quiet:
            warning = unused_options(loaded[0] if isinstance(loaded, tuple) else loaded)
            if warning is not None:
                logger.warning(warning)
        return loaded

    from_pretrained.unwatched = plain  # type: ignore[attr-defined]
    return classmethod(from_pretrained)
