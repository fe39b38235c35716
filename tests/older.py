"""What older versions of Transformers lack as such: their tests are skipped there and nowhere else."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import transformers
from torch import nn

import hf_attn_plugins as hap

VERSION = tuple(int(n) for n in re.findall(r"\d+", transformers.__version__)[:2])
NEWEST = (5, 24)  # from here on nothing below skips
OLDER = VERSION < NEWEST


def default_runs(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `function` gives with the model's default backend; an older version that cannot run it at all is skipped."""
    try:
        return function(*args, **kwargs)
    except Exception as error:
        if not OLDER:
            raise
        pytest.skip(f"Transformers {transformers.__version__} cannot do this with its default backend: {error!r:.200}")


def needs_registry(model: nn.Module, plugin: str) -> None:
    """Skip where an older version's model does not follow the attention registry; `check` must refuse it there."""
    source = inspect.getsource(sys.modules[type(model).__module__])
    if OLDER and not (type(model)._can_set_attn_implementation() and "ALL_ATTENTION_FUNCTIONS" in source):
        assert not hap.check(model, plugin).ok
        pytest.skip(f"{type(model).__name__} does not ask the registry in Transformers {transformers.__version__}")


def needs_common_masks(model: nn.Module) -> None:
    """Skip where an older version's model builds its mask itself, so that no plugin can recognise it."""
    source = inspect.getsource(sys.modules[type(model).__module__])
    if OLDER and "create_causal_mask" not in source:
        pytest.skip(f"{type(model).__name__} builds its own mask in Transformers {transformers.__version__}")


def needs_choice_in_config() -> None:
    """Skip where a load does not follow `attn_implementation` in config.json, so that `set-attention` is refused."""
    if VERSION < (5, 4):
        pytest.skip(f"Transformers {transformers.__version__} does not read attn_implementation from config.json")
