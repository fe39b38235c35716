"""What a family of models says of itself: its default backend, whether it asks the registry, what it passes by name."""

from __future__ import annotations

import ast
import functools
import inspect
import re
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import torch
from torch import nn

from hf_attn_plugins.core.options import shown
from hf_attn_plugins.hf.compat import config_field, supports_sdpa


def own_backend(module: Any) -> str:
    """The attention that a model, or the model of an attention module, has by default: "sdpa", or "eager"."""
    supported = supports_sdpa(type(module))
    if supported is not None:
        return "sdpa" if supported else "eager"
    return own_backend_in(type(module).__module__)


@torch.compiler.assume_constant_result
def own_backend_in(modeling_module: str) -> str:
    """The same for the models of a modeling file, by its module's name."""
    return _backend_of_file(modeling_module)


@functools.cache
def _backend_of_file(modeling_module: str) -> str:
    return _backend_in(sys.modules.get(modeling_module))


@torch.compiler.assume_constant_result
def own_backend_of(config_module: str) -> str:
    """The same for the models of a config's module."""
    return _backend_of(config_module)


@functools.cache
def _backend_of(config_module: str) -> str:
    return _backend_in(modeling_of(config_module))


def _backend_in(modeling: ModuleType | None) -> str:
    """ "eager" where no model of a file supports sdpa, else "sdpa"."""
    here = getattr(modeling, "__name__", None)
    kinds = [kind for kind in vars(modeling or sys).values() if getattr(kind, "__module__", None) == here]
    said = [answer for answer in map(supports_sdpa, kinds) if answer is not None]
    return "eager" if said and not any(said) else "sdpa"


def modeling_of(config_module: str) -> ModuleType | None:
    """The imported module with the models of a config's module, by Transformers' naming; None where there is none."""
    package, _, module = config_module.rpartition(".")
    return sys.modules.get(f"{package}.{module.replace('configuration_', 'modeling_', 1)}")


_ASKED = re.compile(r"isinstance\((attention|causal)_mask, (BlockMask|(torch\.)?Tensor)\)")


@torch.compiler.assume_constant_result
def makes_blocks(config_module: str) -> bool:
    """Whether the models of a config's module give the mask makers blocks that see each other both ways.

    Asked by source (`block_sequence_ids`), since a traced mask function does not tell.
    """
    source = _modeling_source(config_module)
    return source is None or "block_sequence_ids" in source


@torch.compiler.assume_constant_result
def asks_for_type_of_mask(config_module: str) -> bool:
    """Whether the models of a config's module look at the type of the mask that was made for them.

    Doge leaves a BlockMask out, DeepSeek-V4 widens a Tensor only. CTRL asks of the user's mask, before it has one made.
    """
    source = _modeling_source(config_module)
    if source is None or _ASKED.search(source) is None:
        return False
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return any(_asks_for_type(ast.get_source_segment(source, node) or "") for node in functions)


def _asks_for_type(function: str) -> bool:
    """Whether a function's source asks for the type of its mask, once the mask is made if it has one made."""
    made = re.search(r"= create_\w*mask\w*\(", function)
    return _ASKED.search(function, made.end() if made else 0) is not None


@functools.cache
def _modeling_source(config_module: str) -> str | None:
    modeling = modeling_of(config_module)
    try:
        return None if modeling is None else inspect.getsource(modeling)
    except OSError:
        return None


def _asks(modeling: ModuleType) -> bool:
    """Whether a modeling file asks the registry, itself or by a model that it imports (DPR is made of BERT)."""
    kinds = (kind for kind in vars(modeling).values() if isinstance(kind, type) and issubclass(kind, nn.Module))
    others = {kind.__module__ for kind in kinds if kind.__module__.startswith("transformers.models.")}
    files = [modeling, *map(sys.modules.get, others)]
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


@torch.compiler.assume_constant_result
def names_keyword(module_class: Any, keyword: str) -> bool:
    """Whether a keyword of the attention call means something to this family.

    Its attention class passes `keyword=` by name or reads kwargs["keyword"], or its file's own attention takes it.
    """
    return _names_keyword(module_class, keyword)


@functools.cache
def _names_keyword(module_class: Any, keyword: str) -> bool:
    own = vars(sys.modules.get(module_class.__module__) or object).get("eager_attention_forward")
    if own is not None and keyword in inspect.signature(own).parameters:
        return True
    named = re.compile(rf"(?<!\w){re.escape(keyword)} ?=(?!=)|[\"']{re.escape(keyword)}[\"']")
    classes = [cls for cls in module_class.__mro__ if not cls.__module__.startswith("torch.")]
    return any(named.search(class_source(cls)) for cls in classes if cls is not object)


@functools.cache
def class_source(cls: Any) -> str:
    """The source of a class, "" where there is none."""
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""


def stored_options(config: Any, name: str) -> Any:
    """What a config's `hf_attn_plugins` holds for plugin `name`, {} where it holds nothing.

    Raises:
        ValueError: `hf_attn_plugins` is no mapping.
    """
    stored = config_field(config, "hf_attn_plugins")
    if stored is None:
        return {}
    if not isinstance(stored, Mapping):
        raise ValueError(
            f"hf_attn_plugins in the config ({type(config).__name__}) is {shown(stored)}: a mapping of plugin names to "
            "options is needed; correct config.json, or remove it there."
        )
    return stored.get(name) or {}
