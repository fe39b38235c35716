"""A model with an attention under evaluation switched on, and what that attention then did."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hf_attn_plugins.hf.configure import use
from hf_attn_plugins.hf.trace import trace
from hf_attn_plugins.parallel.hf.context_parallel import context_parallel
from hf_attn_plugins.plugins import PLUGINS

from ..configuration import Attention


@dataclass
class Ran:
    """What an attention did while it was switched on: `plan` as in `records.Prediction`."""

    plan: str | None = None


@contextlib.contextmanager
def attending(model: Any, attn: Attention, *, sharded: bool) -> Iterator[Ran]:
    """The model with an attention for a while; `Ran.plan` is filled in when the block ends.

    Args:
        sharded: whether plugins run on all processes of the launch (`context_parallel`), where nothing is traced.
    """
    ran, parallel = Ran(), sharded and attn.implementation in PLUGINS
    chosen: Any = (context_parallel if parallel else use)(model, attn.implementation, **attn.options)
    with chosen, trace(model) as seen:
        yield ran
    if attn.implementation in PLUGINS and not parallel:
        ran.plan = seen.plan()


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """Keep Python's garbage collector away from what is loaded, for the length of a `with` block.

    The runner collects garbage before each measurement. Looking through a loaded model takes a quarter second.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
