"""Where versions of Transformers differ, and every private name of it that this package leans on: one function each.

An upgrade that takes a name away fails here, with one sentence; tests/hf/test_compat.py looks at each name.
`hf/masks/compat.py` does the same for what describes masks, `core/compat.py` for PyTorch.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from hf_attn_plugins.core.compat import gone, needed

FLOOR = (5, 0)
TRANSFORMERS = ("transformers", "5.24")  # and the version that everything here was tested with
NAMES = ("cache", "past_key_values")


# Versions.


def refuse_old(version: str) -> None:
    """Raise ImportError for a Transformers older than the floor; asked when the plugins are registered."""
    if numbers(version) < FLOOR:
        raise ImportError(
            f"hf_attn_plugins needs transformers>={'.'.join(map(str, FLOOR))}, found {version}: "
            "upgrade it with `pip install -U transformers`."
        )


def numbers(version: str) -> tuple[int, ...]:
    """(major, minor) of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def config_carries_attention() -> bool:
    """Whether a load follows `attn_implementation` in config.json: from 5.4 on; before, it is overwritten with None."""
    import transformers

    return numbers(transformers.__version__) >= (5, 4)


def cache_keyword(model: nn.Module) -> str:
    """The keyword of `model.forward` (and of its `generate`) for the cache: `cache` from 5.24 on."""
    return NAMES[0] if NAMES[0] in inspect.signature(model.forward).parameters else NAMES[1]


def returned_cache(output: Any) -> Any:
    """The cache in a model's output: the attribute `cache` from 5.24 on, `past_key_values` before."""
    return getattr(output, _attribute(output))


def set_returned_cache(output: Any, cache: Any) -> None:
    """Put another cache (or None) into a model's output."""
    setattr(output, _attribute(output), cache)


def _attribute(output: Any) -> str:
    return NAMES[0] if hasattr(output, NAMES[0]) else NAMES[1]


# Configs.


def config_field(config: Any, name: str) -> Any:
    """`getattr(config, name, None)`, in a tenth of its time for a config of Transformers: every attention call asks."""
    kind: Any = type(config)
    if torch.compiler.is_compiling() or not _is_plain_field(kind, name):
        return getattr(config, name, None)
    return object.__getattribute__(config, "__dict__").get(name)


@functools.cache
def _is_plain_field(kind: Any, name: str) -> bool:
    """Whether only a config's own `__dict__` can hold `name`: its class neither has the attribute nor renames it."""
    if getattr(kind.__getattribute__, "__module__", None) != "transformers.configuration_utils":
        return False
    return not (hasattr(kind, "__getattr__") or hasattr(kind, name) or name in getattr(kind, "attribute_map", ()))


# Registries.


def registered_names() -> set[str]:
    """Every attention implementation that Transformers knows by name (`AttentionInterface._global_mapping`)."""
    return set(_mappings()[0])


def forget_attention(name: str) -> None:
    """Take a name out of both registries: Transformers has `register`, and no public way back."""
    for mapping in _mappings():
        mapping.pop(name, None)


def registered_attention(name: str) -> Callable[..., Any] | None:
    """The attention function registered under a name; None for a name without one, such as "eager"."""
    return _mappings()[0].get(name)


def registered_mask(name: str) -> Callable[..., Any] | None:
    """The mask function registered under a name, None where there is none."""
    return _mappings()[1].get(name)


def _mappings() -> list[dict[str, Any]]:
    from transformers import AttentionInterface, AttentionMaskInterface

    return [
        needed(interface, "_global_mapping", "list and unregister attention implementations", *TRANSFORMERS)
        for interface in (AttentionInterface, AttentionMaskInterface)
    ]


def quantizer_tables() -> tuple[dict[str, Any], dict[str, Any]]:
    """(configs, quantizers) by method's name: what `from_pretrained` looks a `quantization_config` up in."""
    from transformers.quantizers import auto

    purpose = "bring first-layer tables back at load"
    return (
        needed(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", purpose, *TRANSFORMERS),
        needed(auto, "AUTO_QUANTIZER_MAPPING", purpose, *TRANSFORMERS),
    )


def quantizer_base() -> type:
    """`HfQuantizer`, whose `preprocess_model` and `postprocess_model` are called around the loading of weights."""
    from transformers.quantizers import base

    found = needed(base, "HfQuantizer", "bring first-layer tables back at load", *TRANSFORMERS)
    for method in ("preprocess_model", "postprocess_model"):
        needed(found, method, "bring first-layer tables back at load", *TRANSFORMERS)
    return found


# Configs and models.


def has_implementation(config: Any) -> bool:
    """Whether a config holds an attention implementation of its own (`_attn_implementation_internal`)."""
    return hasattr(config, "_attn_implementation_internal")


def implementation_of(config: Any) -> str | None:
    """The attention implementation that a config holds, None before one was chosen."""
    return needed(
        config, "_attn_implementation_internal", "read and restore a model's attention implementation", *TRANSFORMERS
    )


def set_implementation(config: Any, name: str | None) -> None:
    """Put an implementation back, sub-configs untouched: the public setter would change those as well."""
    implementation_of(config)  # raises where the name is gone: an attribute nobody reads would restore nothing
    config._attn_implementation_internal = name


def can_switch_attention(model: nn.Module | type) -> bool | None:
    """Whether a model's class follows the attention registry (`_can_set_attn_implementation`), None for other modules.

    Transformers reads the class's source; a PreTrainedModel without that method is an upgrade, and refused.
    """
    from transformers import PreTrainedModel

    cls = model if isinstance(model, type) else type(model)
    if not issubclass(cls, PreTrainedModel):
        return None
    return bool(needed(cls, "_can_set_attn_implementation", "tell whether a model can use a plugin", *TRANSFORMERS)())


def supports_sdpa(cls: Any) -> bool | None:
    """Whether a class of models says that it runs with sdpa (`_supports_sdpa`), None for classes that say nothing.

    A PreTrainedModel without that word is an upgrade, and refused.
    """
    from transformers import PreTrainedModel

    if isinstance(cls, type) and issubclass(cls, PreTrainedModel):
        return bool(needed(cls, "_supports_sdpa", "find a model's own attention", *TRANSFORMERS))
    return None


def moves_weights(module: nn.Module) -> bool:
    """Whether Accelerate has hooked a module to move its weights between devices (its attribute `_hf_hook`)."""
    return hasattr(module, "_hf_hook")


def is_stateful(model: nn.Module) -> bool:
    """Whether a model carries a recurrent state (`PreTrainedModel._is_stateful`); False for other modules."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return False
    return bool(needed(model, "_is_stateful", "refuse recurrent models", *TRANSFORMERS))


def has_causal_lm_loss(model: nn.Module) -> bool:
    """Whether a model's loss is the plain next-token loss (`loss_function` is `ForCausalLMLoss` of loss_utils)."""
    from transformers.loss import loss_utils

    plain = needed(loss_utils, "ForCausalLMLoss", "cut a loss into shards", *TRANSFORMERS)
    return getattr(model, "loss_function", None) is plain


def freeze_rope(module: Any, kinds: Iterable[str | None]) -> Any:
    """Keep a rotary embedding's frequencies as they are now; `module.rope_type = result` undoes it.

    Transformers updates them in `dynamic_rope_update`, which looks for "dynamic" and "longrope" in `rope_type`: any
    other word stops it.

    Args:
        module: with a `rope_type`, a name or a dict from layer type to name.
        kinds: layer types to freeze where it is a dict; ignored otherwise.

    Returns:
        the `rope_type` from before.
    """
    from transformers import modeling_rope_utils

    update = needed(modeling_rope_utils, "dynamic_rope_update", "hold rotary frequencies", *TRANSFORMERS)
    source = inspect.getsource(update)
    if "rope_type" not in source or "dynamic" not in source:
        raise gone("`rope_type` in `dynamic_rope_update`", "hold rotary frequencies", *TRANSFORMERS)
    before = module.rope_type
    if isinstance(before, dict):
        chosen = set(kinds)
        module.rope_type = {key: "frozen" if key in chosen else kind for key, kind in before.items()}
    else:
        module.rope_type = "frozen"
    return before


# Caches.


def dynamic_layer() -> type:
    """`cache_utils.DynamicLayer`, the layer that a growing cache is made of."""
    from transformers import cache_utils

    return needed(cache_utils, "DynamicLayer", "keep keys and values of its own", *TRANSFORMERS)


def grow_layers(cache: Any, make: Callable[[], Any]) -> None:
    """Let a `DynamicCache` make its layers by `make()` (the attribute `layer_class_to_replicate`)."""
    needed(cache, "layer_class_to_replicate", "keep keys and values of its own", *TRANSFORMERS)
    cache.layer_class_to_replicate = make
