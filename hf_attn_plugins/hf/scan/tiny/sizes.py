"""The sizes of a tiny model, and the rules by which numbers in a config shrink to them."""

from __future__ import annotations

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
    "esm": {"mask_token_id": 4, "pad_token_id": 0},
    "sam2_hiera_det_model": {"global_attention_blocks": [4]},
    "markuplm": {"max_xpath_tag_unit_embeddings": 256, "max_xpath_subs_unit_embeddings": 1024},
    **{f"{name}_text_model": {"max_position_embeddings": LENGTH} for name in ("owlvit", "owlv2")},
    "paddleocr_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "mrope_section": [2, 3, 3]}},
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
    (r"(vocab_size|vocabulary_size)(_per_layer_input)?$", exactly(VOCAB)),
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


def number(name: str, value: Any) -> Any:
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    for pattern, rule in RULES:
        if re.search(pattern, name):
            return rule(value)
    return value if value <= 2 * WIDTH or "rate" in name or "theta" in name or "base" in name else WIDTH


def sections(value: list[int], rotated: float = 1.0) -> list[int]:
    """Parts of half a head's rotated share, in the proportions they had, each at least 1 where it was."""
    whole, half = sum(value) or 1, int(HEAD_DIM * rotated) // 2
    parts = [max(1, each * half // whole) if each else 0 for each in value]
    parts[0] += half - sum(parts)
    return parts
