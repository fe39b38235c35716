"""Lists in a config that have an entry per layer, and relations between its numbers that shrinking must keep."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from hf_attn_plugins.hf.scan.tiny.sizes import HEADS, IMAGE, MAX_LAYERS, PATCH, WIDTH, number, sections


@dataclasses.dataclass(frozen=True)
class Layers:
    """Which layers of a stack are kept: `kept` are indices into the original `total` layers, in order."""

    name: str
    total: int
    kept: tuple[int, ...]
    count: int | None


def layers_of(values: dict[str, Any]) -> Layers:
    """One layer of every kind that the per-layer lists tell apart, at least two."""
    name = next((n for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers")
                 if isinstance(values.get(n), int)), "")  # fmt: skip
    total = values.get(name, 0) if name else 0
    lists = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) == total > 2]
    indices = [v for k, v in values.items() if is_layer_list(k, v, total)]
    wanted = 2
    out = values.get("_out_indices") or values.get("out_indices") or values.get("backbone_out_indices")
    if isinstance(out, (list, tuple)) and "depths" not in values:
        wanted = max(wanted, len(out))
    if not total:
        return Layers("", 0, (), None)
    kinds: dict[Any, int] = {}
    for layer in range(total):
        kinds.setdefault((*(str(v[layer]) for v in lists), *(layer in v for v in indices)), layer)
    kept = sorted(list(kinds.values())[:MAX_LAYERS])
    shared = values.get("num_kv_shared_layers")
    if isinstance(shared, int) and shared > 0:  # the layers that lend their keys come first, one of every kind
        return Layers(name, total, tuple(kept * 2), 2 * len(kept))
    for layer in range(total):
        if len(kept) >= wanted:
            break
        if layer not in kept:
            kept = sorted([*kept, layer])
    return Layers(name, total, tuple(kept), len(kept))


def is_layer_list(name: str, value: Any, total: int) -> bool:
    """A list of layer numbers, rather than one of sizes."""
    if not (isinstance(value, (list, tuple)) and value and total > 2) or (len(value) == total and len(set(value)) == 1):
        return False
    named = re.search(r"(idx|indices|indexes|_layers$|layer_ids|^layers_|fullatt|attn_layer|global_attn)", name)
    return (
        bool(named)
        and all(type(each) is int and 0 <= each < max(total, 2) for each in value)
        and (list(value) == sorted(set(value)))
    )


def sequence(name: str, value: Any, layers: Layers) -> Any:
    kind = type(value)
    if name == "mrope_section":
        return sections(list(value))
    if not value or layers.total == 0:
        return _sizes(name, value)
    if is_layer_list(name, value, layers.total) and len(layers.kept) == len(set(layers.kept)):
        return kind(new for new, old in enumerate(layers.kept) if old in value)
    if len(value) == layers.total > 2:
        return kind(_sequence_item(name, value[old]) for old in layers.kept)
    if "feature_layer" in name:
        return kind(-1 - i % (layers.count or 1) for i in range(len(value)))
    return _sizes(name, value)


def _sequence_item(name: str, value: Any) -> Any:
    return _sizes(name, value) if isinstance(value, (list, tuple)) else number(name, value)


def _sizes(name: str, value: Any) -> Any:
    """Sizes of stages keep their order, heads become powers of two, depths at most 2."""
    kind = type(value)
    if not value or not all(type(each) is int for each in value):
        return (
            value
            if not value or not isinstance(value[0], (list, tuple))
            else kind(_sizes(name, each) if isinstance(each, (list, tuple)) else each for each in value)
        )
    if re.search(r"depth|num_blocks|repeats|blocks_per_stage|num_of_layers|layers_per|^layers$|num_.*layers", name):
        return kind(min(each, 2) for each in value)
    if "head" in name:
        return kind(1 << (min(each, HEADS).bit_length() - 1) if each > 0 else each for each in value)
    if re.search(r"image_size|input_size|resolution|grid", name):
        return kind(IMAGE if each > IMAGE else each for each in value)
    if re.search(r"patch|tubelet|stride", name):
        return kind(min(each, PATCH) for each in value)
    largest = max(value)
    if largest <= WIDTH and "channels" not in name:
        return value
    if "channels" in name:
        return kind(number("channels", each) for each in value)
    if largest == min(value) or re.search(r"conv_dim|tdnn", name):
        return kind(number(name + "_dim", each) if each > 8 else each for each in value)
    unit = max(1, -(-largest // (2 * WIDTH)))
    return kind(each if each <= 8 else max(HEADS * 4, -(-each // unit // 16) * 16) for each in value)


def relations(before: dict[str, Any], after: dict[str, Any], layers: Layers) -> None:
    """What one field owes to another."""
    out = before.get("_out_indices")
    if out and len(out) > 1:
        last = layers.count or 0
        after["out_indices"] = list(out) if "depths" in before else list(range(last - len(out) + 1, last + 1))
    for name in ("num_kv_shared_layers",):
        if layers.count and isinstance(before.get(name), int) and before[name] > 0:
            after[name] = layers.count // 2
    if after.get("embed_dim_per_stage"):
        after["hidden_size"] = after["embed_dim_per_stage"][0]
    qk, nope, rope = (after.get(n) for n in ("qk_head_dim", "qk_nope_head_dim", "qk_rope_head_dim"))
    if isinstance(qk, int) and isinstance(nope, int) and isinstance(rope, int):
        after["qk_head_dim"] = nope + rope
    heads, keys = after.get("num_attention_heads"), after.get("num_key_value_heads")
    if "num_key_value_heads" in before and before["num_key_value_heads"] is None and isinstance(heads, int):
        after["num_key_value_heads"] = heads
    if isinstance(before.get("num_attention_heads"), int) and before.get("num_key_value_heads") == before.get(
        "num_attention_heads"
    ):
        keys = after["num_key_value_heads"] = heads
    if isinstance(heads, int) and isinstance(keys, int) and heads % keys:
        after["num_key_value_heads"] = heads
