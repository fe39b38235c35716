"""Where versions of Transformers differ, and every private name of it that this package leans on: one function each.

An upgrade that takes a name away fails here, with one sentence; tests/hf/test_compat.py looks at each name.
`core/compat.py` does the same for PyTorch.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.core.compat import gone, needed

FLOOR = (5, 0)
TESTED = "5.24"
NAMES = ("cache", "past_key_values")


# Versions.


def refuse_old(version: str) -> None:
    """Raise ImportError for a Transformers older than the floor; asked when the plugins are registered."""
    if _numbers(version) < FLOOR:
        raise ImportError(
            f"hf_attn_plugins needs transformers>={'.'.join(map(str, FLOOR))}, found {version}: "
            "upgrade it with `pip install -U transformers`."
        )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def config_carries_attention() -> bool:
    """Whether a load follows `attn_implementation` in config.json: from 5.4 on; before, it is overwritten with None."""
    import transformers

    return _numbers(transformers.__version__) >= (5, 4)


@torch.compiler.assume_constant_result
def cuts_wide_masks() -> bool:
    """Whether this version's own attention cuts a mask that is wider than the keys (up to 5.3; Bamba builds such)."""
    import transformers

    return _numbers(transformers.__version__) < (5, 4)


def query_range(
    q_length: int | None, q_offset: int | Tensor, cache_position: Tensor | None, kv_length: int, kv_offset: int
) -> tuple[int, int | Tensor]:
    """(number of queries, index of the first one) from what Transformers gives a mask function.

    From 5.4 on it gives `q_length` and `q_offset`; up to 5.3 `cache_position`, (Q,) long, consecutive indices.

    Raises:
        NotImplementedError: neither is given, as no version known here does.
    """
    if q_length is not None and not isinstance(q_length, Tensor):
        # A static cache advances its own counter in place before attention runs.
        return q_length, q_offset.clone() if isinstance(q_offset, Tensor) else q_offset
    position = q_length if cache_position is None else cache_position
    if position is None:
        raise _gone("`q_length` or `cache_position` among a mask function's arguments", "build attention masks")
    count = position.shape[0]
    if kv_length == count and not kv_offset:
        return count, 0  # as many keys as queries: nothing came before, and nothing has to be read from the device
    return count, position[0].clone() if torch.compiler.is_compiling() else int(position[0])


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


# Registries.


def registered_names() -> set[str]:
    """Every attention implementation that Transformers knows by name (`AttentionInterface._global_mapping`)."""
    return set(_mappings()[0])


def forget_attention(name: str) -> None:
    """Take a name out of both registries: Transformers has `register`, and no public way back."""
    for mapping in _mappings():
        mapping.pop(name, None)


def _mappings() -> list[dict[str, Any]]:
    from transformers import AttentionInterface, AttentionMaskInterface

    return [
        _needed(interface, "_global_mapping", "list and unregister attention implementations")
        for interface in (AttentionInterface, AttentionMaskInterface)
    ]


def quantizer_tables() -> tuple[dict[str, Any], dict[str, Any]]:
    """(configs, quantizers) by method's name: what `from_pretrained` looks a `quantization_config` up in."""
    from transformers.quantizers import auto

    purpose = "bring first-layer tables back at load"
    return (
        _needed(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", purpose),
        _needed(auto, "AUTO_QUANTIZER_MAPPING", purpose),
    )


def quantizer_base() -> type:
    """`HfQuantizer`, whose `preprocess_model` and `postprocess_model` are called around the loading of weights."""
    from transformers.quantizers import base

    found = _needed(base, "HfQuantizer", "bring first-layer tables back at load")
    for method in ("preprocess_model", "postprocess_model"):
        _needed(found, method, "bring first-layer tables back at load")
    return found


# Configs and models.


def has_implementation(config: Any) -> bool:
    """Whether a config holds an attention implementation of its own (`_attn_implementation_internal`)."""
    return hasattr(config, "_attn_implementation_internal")


def implementation_of(config: Any) -> str | None:
    """The attention implementation that a config holds, None before one was chosen."""
    return _needed(config, "_attn_implementation_internal", "read and restore a model's attention implementation")


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
    return bool(_needed(cls, "_can_set_attn_implementation", "tell whether a model can use a plugin")())


def is_stateful(model: nn.Module) -> bool:
    """Whether a model carries a recurrent state (`PreTrainedModel._is_stateful`); False for other modules."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return False
    return bool(_needed(model, "_is_stateful", "refuse recurrent models"))


def has_causal_lm_loss(model: nn.Module) -> bool:
    """Whether a model's loss is the plain next-token loss (`loss_function` is `ForCausalLMLoss` of loss_utils)."""
    from transformers.loss import loss_utils

    plain = _needed(loss_utils, "ForCausalLMLoss", "cut a loss into shards")
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

    update = _needed(modeling_rope_utils, "dynamic_rope_update", "hold rotary frequencies")
    source = inspect.getsource(update)
    if "rope_type" not in source or "dynamic" not in source:
        raise _gone("`rope_type` in `dynamic_rope_update`", "hold rotary frequencies")
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

    return _needed(cache_utils, "DynamicLayer", "keep keys and values of its own")


def grow_layers(cache: Any, make: Callable[[], Any]) -> None:
    """Let a `DynamicCache` make its layers by `make()` (the attribute `layer_class_to_replicate`)."""
    _needed(cache, "layer_class_to_replicate", "keep keys and values of its own")
    cache.layer_class_to_replicate = make


# Masks.


def mask_parts(function: Callable[..., Any]) -> tuple[str, dict[str, Any]] | None:
    """(maker, cells) of a mask function that one of `masking_utils`' makers returned; None for any other function.

    They are closures without public names: told apart by their maker's name, read by the names of their cells.
    `MAKERS` lists the cells that this package reads. A closure from a known maker with other cells gives None as well:
    then attention evaluates the function itself, which is equal and slower.
    """
    closure, code = getattr(function, "__closure__", None), getattr(function, "__code__", None)
    if closure is None or code is None or not function.__module__.startswith("transformers."):
        return None
    maker = function.__qualname__.split(".")[0]
    cells = dict(zip(code.co_freevars, (cell.cell_contents for cell in closure), strict=True))
    return None if MAKERS.get(maker, frozenset()) - set(cells) else (maker, cells)


MAKERS: dict[str, frozenset[str]] = {
    "and_masks": frozenset({"mask_functions"}),
    "or_masks": frozenset({"mask_functions"}),
    "sliding_window_overlay": frozenset({"sliding_window"}),
    "sliding_window_bidirectional_overlay": frozenset({"sliding_window"}),  # from 5.2 on
    "chunked_overlay": frozenset({"chunk_size", "left_padding"}),
    "packed_sequence_mask_function": frozenset({"packed_sequence_mask"}),
    "remap_positions_for_packed_sequence": frozenset({"mask_function", "position_ids"}),
}


def plain_masks() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(causal, bidirectional): the two mask functions that are not closures."""
    from transformers import masking_utils

    purpose = "recognise causal and bidirectional masks"
    return (
        _needed(masking_utils, "causal_mask_function", purpose),
        _needed(masking_utils, "bidirectional_mask_function", purpose),
    )


def _needed(owner: Any, name: str, purpose: str) -> Any:
    return needed(owner, name, purpose, "transformers", TESTED)


def _gone(what: str, purpose: str) -> NotImplementedError:
    return gone(what, purpose, "transformers", TESTED)
