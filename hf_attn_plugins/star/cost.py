"""What a plan costs on a given model: FLOPs, bytes of cache, expected gain, and what looks wrong. Integers only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_attn_plugins.star.plan import DENSE_BELOW, Plan

_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1}
TINY_BLOCK = 64  # tokens; with many blocks of this size the unit was probably mistaken for kilo-tokens
MANY_BLOCKS = 8  # above the paper's own setting, a quarter of the context a block, twice over


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that decide its cost.

    Attributes:
        layers, hidden, heads, kv_heads, head_dim: as in a Transformers config.
        mlp: multiply-adds of one token in one layer's MLP (active experts only).
        bytes_per_value: of one number in the cache.
        windows: the sliding window of each layer, None for a layer with full attention.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    bytes_per_value: int
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> ModelShape:
        """Read the sizes from the contents of a config.json; a composite model's text part counts.

        Raises:
            ValueError: the config names no layers, heads or hidden size.
        """
        config = config.get("text_config") or config

        def first(*names: str) -> Any:
            return next((config[name] for name in names if config.get(name) is not None), None)

        layers, hidden = first("num_hidden_layers", "n_layer", "num_layers"), first("hidden_size", "n_embd", "d_model")
        heads = first("num_attention_heads", "n_head", "num_heads")
        if not (layers and hidden and heads):
            raise ValueError(
                "the config has no num_hidden_layers, hidden_size and num_attention_heads: not a decoder's."
            )
        gated = first("intermediate_size") is not None
        inner = first("moe_intermediate_size", "intermediate_size", "n_inner") or 4 * hidden
        experts = first("num_experts_per_tok", "experts_per_token") or 1
        dtype = str(first("dtype", "torch_dtype") or "bfloat16").removeprefix("torch.")
        return cls(
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=first("num_key_value_heads") or heads,
            head_dim=first("head_dim") or hidden // heads,
            mlp=(3 if gated else 2) * hidden * inner * experts,
            bytes_per_value=_BYTES.get(dtype, 2),
            windows=_windows(config, layers),
        )

    def linear_flops(self, tokens: int) -> int:
        """FLOPs of projections and MLPs over `tokens` tokens; embeddings and the language-model head left out."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return 2 * tokens * self.layers * (attention + self.mlp)

    def attention_flops(self, pairs: int, length: int) -> int:
        """FLOPs of both products over `pairs` pairs a layer; a sliding layer attends at most its window's pairs."""
        total = 0
        for window in self.windows:
            seen = length if window is None else min(window, length)
            total += min(pairs, seen * length - seen * (seen - 1) // 2)
        return 4 * total * self.heads * self.head_dim

    def cache_bytes(self, length: int) -> int:
        """Bytes of keys and values of `length` tokens in every layer."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.bytes_per_value * length


def _windows(config: Mapping[str, Any], layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    if not window or config.get("use_sliding_window") is False:
        return (None,) * layers
    types = config.get("layer_types") or ["sliding_attention"] * layers
    return tuple(window if kind == "sliding_attention" else None for kind in types)


@dataclass(frozen=True)
class Cost:
    """FLOPs of one prefill: dense, star with the anchor's keys reused, and star as published, which recomputes them."""

    dense: int
    star: int
    recomputed: int
    cache_bytes: int

    @property
    def gain(self) -> float:
        """Dense FLOPs over star FLOPs: what the prefill gains where time follows FLOPs."""
        return self.dense / max(1, self.star)


def cost(plan: Plan, shape: ModelShape) -> Cost:
    """The `Cost` of `plan` on a model of this `shape` (tokens and attended pairs, counted)."""
    again = len(plan.anchor) * max(0, plan.num_blocks - 1)
    pairs_again = max(0, plan.num_blocks - 1) * (len(plan.anchor) * (len(plan.anchor) + 1) // 2)
    star = shape.linear_flops(plan.length) + shape.attention_flops(plan.attended_pairs(), plan.length)
    anchors = shape.linear_flops(again) + shape.attention_flops(pairs_again, plan.length)
    return Cost(
        dense=shape.linear_flops(plan.length) + shape.attention_flops(plan.causal_pairs(), plan.length),
        star=star,
        recomputed=star + anchors,
        cache_bytes=shape.cache_bytes(plan.length),
    )


def warnings(plan: Plan, gain: float | None = None) -> list[str]:
    """What a user should look at before running `plan`; `gain` is `Cost.gain` where the model is known."""
    found = []
    if plan.is_dense:
        blocks = "one block" if plan.num_blocks <= 1 else "blocks, anchor and halo leave no gap"
        found.append(f"{blocks}: this plan is plain causal attention and gains nothing.")
    elif plan.length < DENSE_BELOW:
        found.append(
            f"below {DENSE_BELOW} tokens attention costs little: overheads may make star slower than dense attention."
        )
    if plan.halo_size >= plan.block_size:
        pass  # close to a sliding window, however many blocks there are
    elif plan.block_size < TINY_BLOCK and plan.num_blocks > TINY_BLOCK:
        found.append(
            f"{plan.num_blocks} blocks of {plan.block_size} tokens: sizes are in tokens, and so many small blocks are "
            f"slower than dense attention. Did you mean block_size={plan.block_size * 1024}?"
        )
    elif plan.num_blocks > MANY_BLOCKS:
        found.append(
            f"{plan.num_blocks} blocks: more than {MANY_BLOCKS} cost many answers; measure with hf-attn bench star."
        )
    if not plan.is_dense and plan.anchor_size == 0:
        found.append("no anchor: much worse than any anchor in the paper (table 4); a few tokens do beside a halo.")
    if gain is not None and not plan.is_dense and gain < 1.1:
        found.append(f"the expected gain of {gain:.2f}x is small: overheads may make star slower than dense attention.")
    return found
