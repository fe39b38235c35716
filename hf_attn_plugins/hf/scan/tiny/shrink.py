"""A config made tiny by the names of its fields, keeping what has to divide, be equal or be distinct."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Any

from hf_attn_plugins.hf.scan.tiny.layers import layers_of, relations, sequence
from hf_attn_plugins.hf.scan.tiny.sizes import (
    DERIVED,
    FIRST_SPECIAL,
    HEAD_DIM,
    OVERRIDES,
    POSITIONS,
    UNSET,
    VOCAB,
    number,
    sections,
)


def shrunk(config: Any, in_place: bool = False) -> Any:
    """A config of the same class, tiny.

    Args:
        config: any `PreTrainedConfig`; it is not changed.
        in_place: set the fields of a copy rather than build the config anew from them. Building derives dependent
            fields again; some classes do not take back what they write out.

    Raises:
        ValueError: the shrunken fields are not what the class accepts.
    """
    tokens = Tokens()
    if not in_place:
        return _rebuilt(config, tokens)
    config = copy.deepcopy(config)
    _in_place(config, tokens, set())
    return config


class Tokens:
    """Special token ids of one model: those that were equal stay equal, those that differed stay different."""

    def __init__(self) -> None:
        self.known: dict[Any, int] = {}

    def __call__(self, name: str, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [self(name, each) for each in value]
        if not isinstance(value, int) or value < 0:
            return value
        for word, fixed in (("pad_", 0), ("bos_", 1), ("eos_", 2), ("decoder_start", 3)):
            if name.startswith(word):
                return fixed
        return self.known.setdefault(value, FIRST_SPECIAL + len(self.known) % (VOCAB - FIRST_SPECIAL))


def fields_of(config: Any) -> dict[str, Any]:
    """The values a config would be built from."""
    names = {field.name for field in dataclasses.fields(config)} if dataclasses.is_dataclass(config) else None
    values = {name: value for name, value in vars(config).items() if names is None or name in names}
    return {name: value for name, value in values.items() if name not in DERIVED - {"_out_indices"}}


def _rebuilt(config: Any, tokens: Tokens) -> Any:
    if getattr(config, "model_type", "") == "timm_backbone":
        return _backbone()  # timm need not be installed, and any feature pyramid will do
    values = _tiny(_with_sections(config, fields_of(config)), tokens, lambda each: _rebuilt(each, tokens))
    values.pop("_out_indices", None)
    values.update(OVERRIDES.get(getattr(config, "model_type", ""), {}))
    try:
        return type(config)(**values)
    except (TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{type(config).__name__} cannot be built from its own fields: {error}") from error


def _backbone() -> Any:
    from transformers import ResNetConfig

    make: Any = ResNetConfig  # its checked signature leaves out what its base class takes
    return make(
        embedding_size=16, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip


def _in_place(config: Any, tokens: Tokens, seen: set[int]) -> None:
    if id(config) in seen:
        return
    seen.add(id(config))

    def inner(each: Any) -> Any:
        _in_place(each, tokens, seen)
        return each

    fields = {k: v for k, v in vars(config).items() if k not in DERIVED - {"_out_indices"}}
    values = _tiny(_with_sections(config, fields), tokens, inner)
    values.update(OVERRIDES.get(getattr(config, "model_type", ""), {}))
    for name, value in values.items():
        object.__setattr__(config, name, value)


def _with_sections(config: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The fields, with the sections of a multi-axis RoPE, where the model would fall back on those of its full size."""
    rope = values.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in (getattr(config, "ignore_keys_at_rope_validation", None) or ()):
        return {**values, "rope_parameters": {"mrope_section": [2, 3, 3], **rope}}
    return values


def _tiny(values: dict[str, Any], tokens: Tokens, inner: Callable[[Any], Any]) -> dict[str, Any]:
    """The shrunken fields of one config; `inner` shrinks a config within it."""
    layers = layers_of(values)
    result = {}
    for name, value in values.items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            result[name] = inner(value)
        elif _is_token(name):
            result[name] = tokens(name, value)
        elif name in ("suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids"):
            result[name] = None
        elif isinstance(value, (list, tuple)):
            result[name] = sequence(name, value, layers)
        elif isinstance(value, dict):
            result[name] = _mapping(value, tokens, inner)
        elif value is None:
            result[name] = UNSET.get(name)
        else:
            result[name] = number(name, value)
    if layers.kept and layers.count is not None:
        result[layers.name] = layers.count
    relations(values, result, layers)
    return result


def _is_token(name: str) -> bool:
    return bool(re.search(r"(token_id|token_index|token_ids|_token_idx|start_token|end_token)s?$", name)) and not (
        name.startswith("num")
    )


def _mapping(value: dict[str, Any], tokens: Tokens, inner: Callable[[Any], Any]) -> dict[str, Any]:
    """Rotary parameters and the like: section lengths follow the head width, the rest is kept or shrunken."""
    result: dict[str, Any] = {}
    for name, each in value.items():
        if isinstance(each, dict):
            result[name] = _mapping(each, tokens, inner)
        elif name == "mrope_section":
            result[name] = sections(each, value.get("partial_rotary_factor", 1.0))
        elif name in ("short_factor", "long_factor") and isinstance(each, (list, tuple)):
            result[name] = list(each[: HEAD_DIM // 2])
        elif name == "original_max_position_embeddings":
            result[name] = min(each, POSITIONS)
        elif isinstance(each, int) and isinstance(name, str) and name != "rope_theta":
            result[name] = number(name, each)
        else:
            result[name] = each
    return result
