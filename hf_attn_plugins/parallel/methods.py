"""The table of methods that can run on several ranks: "module:class" by the name of the plugin."""

from __future__ import annotations

import importlib
from typing import Any

from hf_attn_plugins.parallel.method import Method

METHODS = {
    "star_attention": "hf_attn_plugins.parallel.star:Star",
    "tiled_attention": "hf_attn_plugins.parallel.dense:Dense",
    "cqs_attention": "hf_attn_plugins.parallel.cqs:CQS",
}


def method(name: str, **options: Any) -> Method:
    """The method called `name`, with its options validated.

    Raises:
        ValueError: no such method, an option it does not have, or a value out of range.
    """
    if name not in METHODS:
        raise ValueError(f"{name!r} does not run on several ranks: choose one of {', '.join(METHODS)}.")
    module, made = METHODS[name].split(":")
    kind = getattr(importlib.import_module(module), made)
    unknown = sorted(set(options) - set(kind.names()))
    if unknown:
        raise ValueError(
            f"context_parallel(..., {name!r}) has no option {', '.join(unknown)}: it takes {', '.join(kind.names())}."
        )
    return kind(**options)
