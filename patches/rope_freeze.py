"""Freeze rotary embeddings that change with the input's length, so that blocks computed apart fit together."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from hf_attn_plugins.checkpoint.config import naming
from hf_attn_plugins.checkpoint.source import CONFIG, Source
from hf_attn_plugins.checkpoint.write import Patch
from hf_attn_plugins.hf.inputs.arguments import add_trust_argument

SUMMARY = "fix a RoPE that changes with length (dynamic, longrope) at one length"
KINDS = ("dynamic", "longrope")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --max-length and --trust-remote-code."""
    parser.add_argument("--max-length", type=int, required=True, metavar="N", help="tokens to freeze the RoPE for")
    add_trust_argument(parser)


def plan(source: Source, arguments: argparse.Namespace) -> Patch:
    """The config with every changing RoPE frozen.

    Dynamic NTK scaling at N tokens is plain RoPE with the base theta * (factor * N / M - factor + 1)^(d / (d - 2)), M
    being max_position_embeddings; longrope switches between two lists of factors at original_max_position_embeddings,
    of which the one for N tokens is kept. Source: `transformers.modeling_rope_utils`.

    Raises:
        ValueError: no RoPE of the config changes with length, or the length is no positive number.
    """
    length = arguments.max_length
    if length < 1:
        raise ValueError(f"--max-length {length}: at least 1 token is needed.")
    config = copy.deepcopy(source.config)
    notes: list[str] = []
    with naming(source.folder / CONFIG):
        for name, part in _configs(config):
            for place, rope in _ropes(part):
                kind = rope.get("rope_type", rope.get("type"))
                if kind == "dynamic":
                    notes.append(_freeze_dynamic(part, rope, length, name + place))
                elif kind == "longrope":
                    notes.append(_freeze_longrope(part, rope, length, name + place))
    if not notes:
        raise ValueError(f"{source.folder}: no rope_type is one of {', '.join(KINDS)}, nothing changes with length.")
    notes.append("Keys cached at one length now fit queries at any other, which blockwise methods rely on.")

    def verify(folder: Path) -> None:
        _verify(source.folder, folder, length, arguments.trust_remote_code)

    return Patch("rope-freeze", {"max_length": length}, config, notes, verify=verify)


def _configs(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [("", config)] + [(f"{k}.", v) for k, v in config.items() if k.endswith("_config") and isinstance(v, dict)]


def _ropes(config: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Every RoPE of a config: Transformers 5 writes rope_parameters (maybe one a layer type), 4 wrote rope_scaling."""
    found = []
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if isinstance(rope, dict) and rope and all(isinstance(value, dict) for value in rope.values()):
            found += [(f"{key}.{layer}", each) for layer, each in rope.items()]
        elif isinstance(rope, dict):
            found.append((key, rope))
    return found


def _freeze_dynamic(config: dict[str, Any], rope: dict[str, Any], length: int, place: str) -> str:
    theta = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    longest, factor = _whole("max_position_embeddings", config["max_position_embeddings"]), float(rope["factor"])
    if not factor >= 1:
        raise ValueError(f"{place}: a dynamic factor of {factor} is below 1, which no RoPE scaling has.")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    dim = int(head_dim * rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)))
    frozen = theta
    if length > longest:
        frozen = theta * (factor * length / longest - (factor - 1)) ** (dim / (dim - 2))
    for key in ("factor", "type"):
        rope.pop(key, None)
    rope["rope_type"] = "default"
    rope["rope_theta"] = frozen
    if "rope_theta" in config:
        config["rope_theta"] = frozen
    return (
        f"{place}: dynamic with base {theta:g} becomes plain RoPE with base {frozen:g}, right for {length} tokens"
        + (
            f"; inputs of up to {longest} tokens used base {theta:g} before and change slightly."
            if frozen != theta
            else "."
        )
    )


def _whole(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value) or value < 1:
        raise ValueError(f"{name} is {value!r}: a whole number of at least 1 is needed.")
    return int(value)


def _freeze_longrope(config: dict[str, Any], rope: dict[str, Any], length: int, place: str) -> str:
    border = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
    if border is None:
        border = config["max_position_embeddings"]
    kept, dropped = ("long", "short") if length > border else ("short", "long")
    rope[f"{dropped}_factor"] = list(rope[f"{kept}_factor"])
    side = "up to" if kept == "long" else "beyond"
    return f"{place}: longrope keeps its {kept} factors; inputs {side} {border} tokens used the {dropped} ones before."


def _verify(before: Path, after: Path, length: int, trust: bool) -> None:
    """The frozen frequencies equal the changing ones at `length`, and no longer depend on it."""
    import torch
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from hf_attn_plugins.hf.inputs.load import read_config

    old, new = (read_config(folder, trust_remote_code=trust).get_text_config() for folder in (before, after))

    def frequencies(config: Any, tokens: int, layer: str | None, rope: dict[str, Any]) -> torch.Tensor:
        if rope["rope_type"] == "default":
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            dim = int(head_dim * rope.get("partial_rotary_factor", 1.0))
            return rope["rope_theta"] ** -(torch.arange(0, dim, 2, dtype=torch.int64).float() / dim)
        init = ROPE_INIT_FUNCTIONS[rope["rope_type"]]
        return init(config, torch.device("cpu"), tokens, **({} if layer is None else {"layer_type": layer}))[0]

    nested = all(isinstance(value, dict) for value in old.rope_parameters.values())
    for layer in list(old.rope_parameters) if nested else [None]:
        old_rope, new_rope = (c.rope_parameters if layer is None else c.rope_parameters[layer] for c in (old, new))
        wanted = frequencies(old, length, layer, old_rope)
        for tokens in (1, length, 2 * length):
            if not torch.allclose(frequencies(new, tokens, layer, new_rope), wanted, rtol=1e-4):
                raise ValueError(
                    f"the frozen RoPE differs from the changing one at {length} tokens (read at {tokens})."
                )
