"""A config made tiny by the names of its fields, keeping what has to divide, be equal or be distinct."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable
from typing import Any

WIDTH, HEADS, KEY_HEADS, HEAD_DIM = 64, 4, 2, 16
FEED_FORWARD = 96
VOCAB = 128
FIRST_SPECIAL = 100  # ids below are words; image, audio and other special tokens get ids from here on
POSITIONS = 256
IMAGE, PATCH = 32, 8
WINDOW = 6
LENGTH = 40  # tokens of the text that `inputs` makes; factors of positions have to multiply to it
MAX_LAYERS = 6

# Fields of sub-modules and of the saved file that a rebuilt config derives anew.
DERIVED = {"_out_features", "_out_indices", "stage_names", "transformers_version", "dtype", "torch_dtype",
           "quantization_config", "architectures", "model_type", "_attn_implementation", "per_layer_config",
           "_name_or_path", "id2label", "label2id", "output_attentions", "problem_type"}  # fmt: skip

# Fields that some class leaves at None and needs all the same.
UNSET: dict[str, Any] = {
    "vocab_size": VOCAB, "prediction_length": 4, "attn_layer_indices": [1], "head_dim": HEAD_DIM,
    "num_experts_per_tok": 2, "topk_group": 1, "n_group": 1, "n_routed_experts": 4,
    "shared_expert_intermediate_size": FEED_FORWARD,
    "token_budget": 8, "compress_ratio": 4, "vocabulary_map": {"<image>": FIRST_SPECIAL},
}  # fmt: skip

# What nothing general can know: fields by model type, after everything else.
OVERRIDES: dict[str, dict[str, Any]] = {
    "chameleon_vqgan": {"attn_resolutions": None},
    "reformer": {"axial_pos_embds_dim": [WIDTH // 4, 3 * WIDTH // 4], "axial_pos_shape": [4, LENGTH // 4],
                 "attn_layers": ["local", "lsh"], "max_position_embeddings": LENGTH},
    "wav2vec2-bert": {"vocab_size": VOCAB},
    "lw_detr_vit": {"image_size": 64, "pretrain_image_size": 64, "num_windows": 4},
    "squeezebert": {f"{name}_groups": 4 for name in ("q", "k", "v", "post_attention", "intermediate", "output")},
    "cvt": {"depth": [1, 1, 2], "num_heads": [1, 2, 4], "embed_dim": [16, 32, 64]},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "cohere_compass": {"rope_parameters": None},
}  # fmt: skip


def least(bound: int) -> Callable[[int], int]:
    """A rule: the value, at most `bound`."""
    return lambda value: min(value, bound)


def exactly(new: int) -> Callable[[int], int]:
    """A rule: `new`, where the value is positive."""
    return lambda value: new if value > 0 else value


# The first pattern found in a field's name says what becomes of a whole number.
RULES: list[tuple[str, Callable[[int], int]]] = [
    (r"^(num_channels|in_channels|in_chans|audio_channels|num_labels|channels|input_channels|out_channels)$",
     lambda v: v if v <= 16 else 32),
    (r"(vocab_size|vocabulary_size)$", exactly(VOCAB)),
    (r"channels$", lambda v: v if v <= 16 else 32 * -(-v // 256)),
    (r"num_mel_bins|n_mels|mel_bins|^feature_size|^input_feat_per_channel|mel_dim|model_in_dim", least(16)),
    (r"max_2d_position", least(POSITIONS)),
    (r"(rel_pos_bins|rel_2d_pos_bins|num_buckets|max_distance|max_rel)", least(16)),
    (r"max_source_positions", least(64)),
    (r"(position_embeddings|n_positions|max_position|context_length|max_seq_len|_positions$|max_sequence_length|n_ctx"
     r"|seq_len$|seq_length$|max_pos_emb)", least(POSITIONS)),
    (r"(experts_per_tok|experts_per_token|moe_top_?k|_topk$|top_k$|moe_k$|num_selected|top_k_experts)", least(2)),
    (r"^(n_group|num_expert_group)$", least(2)),
    (r"^topk_group$", least(1)),
    (r"(shared_experts?$|zero_experts?|null_experts?)", least(1)),
    (r"(num|n)_?(local|routed|virtual)?_?experts|moe_num_experts|expert_num|num_expert", exactly(4)),
    (r"index_n_heads", least(4)),
    (r"(mamba|ssm|conv).*(n|num)_heads$|^time_step_rank$|^mamba_num_heads$|^n_mamba_heads$", lambda v: min(v, 8)),
    (r"mamba_d_ssm", exactly(8 * HEAD_DIM)),
    (r"offset$", least(1)),
    (r"(mamba|ssm).*(d_head|head_dim)$", exactly(HEAD_DIM)),
    (r"linear_num_value_heads", exactly(HEADS)),
    (r"(linear_num_key|key_value|kv|num_key|multi_query_group_num|n_head_kv).*(heads|groups?|num|kv)$",
     lambda v: 1 if v == 1 else KEY_HEADS),
    (r"(dim_per_head|per_head)", exactly(HEAD_DIM)),
    (r"(heads?|n_head|num_heads|head_count)$", lambda v: min(v, HEADS) if v < HEADS else HEADS),
    (r"global_head_dim", exactly(2 * HEAD_DIM)),
    (r"(qk_rope_head_dim|qk_nope_head_dim|^v_head_dim|qk_pos|rotary_dim$)", exactly(HEAD_DIM // 2)),
    (r"(head_dim|attention_head_size|head_size|d_kv|dim_head|kv_channels|attention_key_channels)$", exactly(HEAD_DIM)),
    (r"(lora_rank|low_rank|_rank$)", least(16)),
    (r"(d_state|state_size|ssm_state)", least(8)),
    (r"(num_hidden_layers|n_layers?|num_layers|_layers$|^depth$|_depth$|num_blocks|n_blocks|^layers$|num_encoder_blocks)",
     least(2)),
    (r"(pattern|interval|every|frequency|period|sparse_step|_freq)(_n)?$", least(2)),
    (r"(first_k_dense_replace|start_index|max_window_layers|insert_layer_id|num_nextn|mtp|dense_layers?$)", least(1)),
    (r"index_topk|compress", least(4)),
    (r"sliding_window|local_attention|attention_window|local_window|attention_context|^window$", least(WINDOW)),
    (r"(chunk_size|chunk_length|block_length|block_size)", least(8)),
    (r"window_size|n_window", lambda v: 32 if v >= 64 else min(v, 4)),
    (r"(image|img|input|pretrain|crop)_(size|resolution)$|^resolution$|^image_size$|tile_size", exactly(IMAGE)),
    (r"temporal_patch|temporal_size", least(2)),
    (r"patch_size|patch_stride|patch_length|stride_size|tubelet", lambda v: PATCH if v > PATCH else v),
    (r"num_(position_embeddings|patches|image_tokens)|image_seq_len|tokens_per_image|image_token_num",
     exactly((IMAGE // PATCH) ** 2)),
    (r"(num_frames|n_frames|frames)$", least(4)),
    (r"(codebook_size|num_embeddings)$", least(32)),
    (r"(intermediate|ffn_dim|d_ff|mlp_dim|ffn_hidden|feed_forward|inner_dim|n_inner|mlp_hidden|ffn_size|feedforward_size)",
     exactly(FEED_FORWARD)),
    (r"_dim_divisor|groups|_norm_num_groups|conv_pos_embedding_groups", least(4)),
    (r"num_conv_pos_embeddings", least(16)),
    (r"(hidden|embed|embd|d_model|_dim|^dim|width|projection|units|_size|channels|filters|queries|latents)",
     lambda v: WIDTH if v > WIDTH else v),
]  # fmt: skip


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
    values = _tiny(fields_of(config), tokens, lambda each: _rebuilt(each, tokens))
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

    values = _tiny({k: v for k, v in vars(config).items() if k not in DERIVED - {"_out_indices"}}, tokens, inner)
    values.update(OVERRIDES.get(getattr(config, "model_type", ""), {}))
    for name, value in values.items():
        object.__setattr__(config, name, value)


def _tiny(values: dict[str, Any], tokens: Tokens, inner: Callable[[Any], Any]) -> dict[str, Any]:
    """The shrunken fields of one config; `inner` shrinks a config within it."""
    layers = _layers(values)
    result = {}
    for name, value in values.items():
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            result[name] = inner(value)
        elif _is_token(name):
            result[name] = tokens(name, value)
        elif name in ("suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids"):
            result[name] = None
        elif isinstance(value, (list, tuple)):
            result[name] = _sequence(name, value, layers)
        elif isinstance(value, dict):
            result[name] = _mapping(value, tokens, inner)
        elif value is None:
            result[name] = UNSET.get(name)
        else:
            result[name] = _number(name, value)
    if layers.kept and layers.count is not None:
        result[layers.name] = layers.count
    _relations(values, result, layers)
    return result


def _is_token(name: str) -> bool:
    return bool(re.search(r"(token_id|token_index|token_ids|_token_idx|start_token|end_token)s?$", name)) and not (
        name.startswith("num")
    )


def _number(name: str, value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    for pattern, rule in RULES:
        if re.search(pattern, name):
            return rule(value)
    return value if value <= 2 * WIDTH or "rate" in name or "theta" in name or "base" in name else WIDTH


def _mapping(value: dict[str, Any], tokens: Tokens, inner: Callable[[Any], Any]) -> dict[str, Any]:
    """Rotary parameters and the like: section lengths follow the head width, the rest is kept or shrunken."""
    result: dict[str, Any] = {}
    for name, each in value.items():
        if isinstance(each, dict):
            result[name] = _mapping(each, tokens, inner)
        elif name == "mrope_section":
            result[name] = _sections(each)
        elif name in ("short_factor", "long_factor") and isinstance(each, (list, tuple)):
            result[name] = list(each[: HEAD_DIM // 2])
        elif name == "original_max_position_embeddings":
            result[name] = min(each, POSITIONS)
        elif isinstance(each, int) and isinstance(name, str) and name != "rope_theta":
            result[name] = _number(name, each)
        else:
            result[name] = each
    return result


def _sections(value: list[int]) -> list[int]:
    """Parts of half a head, in the proportions they had, each at least 1 where it was."""
    whole, half = sum(value) or 1, HEAD_DIM // 2
    parts = [max(1, each * half // whole) if each else 0 for each in value]
    parts[0] += half - sum(parts)
    return parts


@dataclasses.dataclass(frozen=True)
class Layers:
    """Which layers of a stack are kept: `kept` are indices into the original `total` layers, in order."""

    name: str
    total: int
    kept: tuple[int, ...]
    count: int | None


def _layers(values: dict[str, Any]) -> Layers:
    """One layer of every kind that the per-layer lists tell apart, at least two."""
    name = next((n for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers")
                 if isinstance(values.get(n), int)), "")  # fmt: skip
    total = values.get(name, 0) if name else 0
    lists = [v for v in values.values() if isinstance(v, (list, tuple)) and len(v) == total > 2]
    indices = [v for k, v in values.items() if _is_layer_list(k, v, total)]
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


def _is_layer_list(name: str, value: Any, total: int) -> bool:
    """A list of layer numbers, rather than one of sizes."""
    if not (isinstance(value, (list, tuple)) and value and total > 2) or (len(value) == total and len(set(value)) == 1):
        return False
    named = re.search(r"(idx|indices|indexes|_layers$|layer_ids|^layers_|fullatt|attn_layer|global_attn)", name)
    return (
        bool(named)
        and all(type(each) is int and 0 <= each < max(total, 2) for each in value)
        and (list(value) == sorted(set(value)))
    )


def _sequence(name: str, value: Any, layers: Layers) -> Any:
    kind = type(value)
    if name == "mrope_section":
        return _sections(list(value))
    if not value or layers.total == 0:
        return _sizes(name, value)
    if _is_layer_list(name, value, layers.total) and len(layers.kept) == len(set(layers.kept)):
        return kind(new for new, old in enumerate(layers.kept) if old in value)
    if len(value) == layers.total > 2:
        return kind(_sequence_item(name, value[old]) for old in layers.kept)
    if "feature_layer" in name:
        return kind(-1 - i % (layers.count or 1) for i in range(len(value)))
    return _sizes(name, value)


def _sequence_item(name: str, value: Any) -> Any:
    return _sizes(name, value) if isinstance(value, (list, tuple)) else _number(name, value)


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
        return kind(_number("channels", each) for each in value)
    if largest == min(value) or re.search(r"conv_dim|tdnn", name):
        return kind(_number(name + "_dim", each) if each > 8 else each for each in value)
    unit = max(1, -(-largest // (2 * WIDTH)))
    return kind(each if each <= 8 else max(HEADS * 4, -(-each // unit // 16) * 16) for each in value)


def _relations(before: dict[str, Any], after: dict[str, Any], layers: Layers) -> None:
    """What one field owes to another."""
    out = before.get("_out_indices")
    if out and len(out) > 1:
        last = layers.count or 0
        after["out_indices"] = list(out) if "depths" in before else list(range(last - len(out) + 1, last + 1))
    for name in ("num_kv_shared_layers",):
        if layers.count and isinstance(before.get(name), int) and before[name] > 0:
            after[name] = layers.count // 2
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
