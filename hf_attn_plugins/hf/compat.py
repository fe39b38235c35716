"""By what name a model takes and returns its cache: `cache` from Transformers 5.24 on, `past_key_values` before."""

from __future__ import annotations

import functools
import inspect
import sys
from types import ModuleType
from typing import Any

import torch
from torch import nn

NAMES = ("cache", "past_key_values")


def cache_keyword(model: nn.Module) -> str:
    """The keyword of `model.forward` (and of its `generate`) for the cache."""
    return NAMES[0] if NAMES[0] in inspect.signature(model.forward).parameters else NAMES[1]


def returned_cache(output: Any) -> Any:
    """The cache in a model's output."""
    return getattr(output, _attribute(output))


def set_returned_cache(output: Any, cache: Any) -> None:
    """Put another cache (or None) into a model's output."""
    setattr(output, _attribute(output), cache)


def _attribute(output: Any) -> str:
    return NAMES[0] if hasattr(output, NAMES[0]) else NAMES[1]


def registered_names() -> set[str]:
    """Every attention implementation that Transformers knows by name (`AttentionInterface._global_mapping`)."""
    from transformers import AttentionInterface

    return set(AttentionInterface._global_mapping)


def forget_attention(name: str) -> None:
    """Take a name out of both registries: Transformers has `register`, and no public way back."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)


def is_causal_function(function: Any) -> bool:
    """Whether a mask function is Transformers' plain causal one (`masking_utils.causal_mask_function`)."""
    from transformers import masking_utils

    return function is masking_utils.causal_mask_function


def is_bidirectional_function(function: Any) -> bool:
    """Whether a mask function is Transformers' plain full one (`masking_utils.bidirectional_mask_function`)."""
    from transformers import masking_utils

    return function is masking_utils.bidirectional_mask_function


def closure_of(function: Any) -> tuple[str, dict[str, Any]] | None:
    """(maker, cells) of a closure from Transformers' masking utilities; None for any other function.

    Reads `__qualname__` ("and_masks.<locals>.and_mask") and the cells by `co_freevars`: these closures have no public
    names. A Transformers that renames them gets the slower, equally exact predicate.
    """
    closure, code = getattr(function, "__closure__", None), getattr(function, "__code__", None)
    if closure is None or code is None or not function.__module__.startswith("transformers."):
        return None
    cells = dict(zip(code.co_freevars, (cell.cell_contents for cell in closure), strict=True))
    return function.__qualname__.split(".")[0], cells


@torch.compiler.assume_constant_result
def makes_blocks(config_module: str) -> bool:
    """Whether the models of a config's module give the mask makers blocks that see each other both ways.

    Asked by source (`block_sequence_ids`), since a traced mask function does not tell.
    """
    source = _modeling_source(config_module)
    return source is None or "block_sequence_ids" in source


@functools.cache
def _modeling_source(config_module: str) -> str | None:
    modeling = modeling_of(config_module)
    try:
        return None if modeling is None else inspect.getsource(modeling)
    except OSError:
        return None


def modeling_of(config_module: str) -> ModuleType | None:
    """The imported module with the models of a config's module, by Transformers' naming; None where there is none."""
    package, _, module = config_module.rpartition(".")
    return sys.modules.get(f"{package}.{module.replace('configuration_', 'modeling_', 1)}")


def _asks(modeling: ModuleType) -> bool:
    """Whether a modeling file asks the registry, itself or by a model that it imports (DPR is made of BERT)."""
    kinds = (kind for kind in vars(modeling).values() if isinstance(kind, type) and issubclass(kind, nn.Module))
    files = [modeling, *(sys.modules.get(kind.__module__) for kind in kinds)]
    return any(hasattr(file, "ALL_ATTENTION_FUNCTIONS") for file in files)


@functools.cache
def refuse_models_that_never_ask(config_module: str) -> None:
    """Raise ValueError for a model whose modeling files never mention `ALL_ATTENTION_FUNCTIONS`."""
    modeling = modeling_of(config_module)
    if modeling is not None and not _asks(modeling):
        raise ValueError(
            f"models of {modeling.__name__} compute attention themselves and never ask Transformers' attention "
            'registry, so no plugin can take effect: load this model with attn_implementation="eager" or "sdpa".'
        )


def stored_options(config: Any, name: str) -> dict[str, Any]:
    """The options of plugin `name` as they stand in a config's `hf_attn_plugins`, {} where it holds none.

    Raises:
        ValueError: `hf_attn_plugins`, or the plugin's entry, is no mapping.
    """
    stored = getattr(config, "hf_attn_plugins", None)
    if not stored:
        return {}
    own = stored.get(name, {}) if isinstance(stored, dict) else None
    if not isinstance(own, dict):
        raise ValueError(
            f"hf_attn_plugins in this model's config must be {{plugin: {{option: value}}}}, got {stored!r}: mend "
            "config.json, or set model.config.hf_attn_plugins = {}."
        )
    return own


def own_backend(module: Any) -> str:
    """The attention that a model, or the model of an attention module, has by default: "sdpa", or "eager"."""
    if hasattr(type(module), "_supports_sdpa"):
        return "sdpa" if type(module)._supports_sdpa else "eager"
    return _backend_in(sys.modules.get(type(module).__module__))


@functools.cache
def own_backend_of(config_module: str) -> str:
    """The same for the models of a config's module."""
    return _backend_in(modeling_of(config_module))


def _backend_in(modeling: ModuleType | None) -> str:
    """ "eager" where no model of a file supports sdpa (`_supports_sdpa`), else "sdpa"."""
    here = getattr(modeling, "__name__", None)
    kinds = [kind for kind in vars(modeling or sys).values() if getattr(kind, "__module__", None) == here]
    said = [kind._supports_sdpa for kind in kinds if hasattr(kind, "_supports_sdpa")]
    return "eager" if said and not any(said) else "sdpa"


@torch.compiler.assume_constant_result
def names_keyword(module_class: Any, keyword: str) -> bool:
    """Whether an attention class passes `keyword=` by name, so that it means something to this family."""
    return f"{keyword}=" in class_source(module_class).replace(f"{keyword} =", f"{keyword}=")


@functools.cache
def class_source(cls: Any) -> str:
    """The source of a class, "" where there is none."""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""
