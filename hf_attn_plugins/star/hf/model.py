"""What the explicit form needs to know about a model: whether it can encode by blocks, and its windows."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.hf.compat import freeze_rope, is_stateful
from hf_attn_plugins.hf.models.families import stored_options
from hf_attn_plugins.star.options import StarOptions
from hf_attn_plugins.star.plan import Plan

KNOWN_LAYERS = {"full_attention", "sliding_attention"}


def text_config(model: nn.Module) -> Any:
    """The config of the text decoder."""
    config: Any = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def decoder(model: nn.Module) -> nn.Module:
    """The part of the model below its language-model head: encoding needs no logits."""
    return model.get_decoder() if hasattr(model, "get_decoder") else model.base_model  # type: ignore[operator, return-value]


def check_model(model: nn.Module) -> None:
    """Raise NotImplementedError for a model whose context is more than causal keys and values, with the reason."""
    config = text_config(model)
    kinds = set(getattr(config, "layer_types", None) or ()) - KNOWN_LAYERS
    reason = None
    if getattr(config, "is_encoder_decoder", False):
        reason = "an encoder-decoder, whose context is not a prefix of its decoder"
    elif is_stateful(model) or kinds & {"linear_attention", "mamba", "recurrent", "conv"}:
        reason = "recurrent, and its states cannot be put together from blocks"
    elif kinds:
        reason = f"made of layers of kind {', '.join(sorted(kinds))}, whose reach blocks would change"
    elif getattr(config, "use_bidirectional_attention", False) or getattr(config, "is_causal", True) is False:
        reason = "bidirectional, so that its anchor would differ from block to block"
    elif "position_ids" not in inspect.signature(decoder(model).forward).parameters or getattr(config, "alibi", False):
        reason = "one that counts positions by places in its cache, which are not a block's true positions"
    if reason:
        raise NotImplementedError(
            f"star.encode cannot encode {type(model).__name__} by blocks: it is {reason}. Use "
            'attn_implementation="tiled_attention" and an ordinary prefill.'
        )


def stored_heads(model: nn.Module) -> tuple[tuple[int, ...], ...] | None:
    """The key heads that the model's config names as dense, of every layer, or None."""
    config = text_config(model)
    where = f"hf_attn_plugins['star_attention'] in the config ({type(config).__name__})"
    options: Any = StarOptions.of(stored_options(config, "star_attention"), where)
    return options.dense_heads


def windows(model: nn.Module) -> tuple[int | None, bool]:
    """(sliding window or None, whether layers without one are mixed in) of a model."""
    config = text_config(model)
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    if (
        window is None
        or (kinds and "sliding_attention" not in kinds)
        or getattr(config, "use_sliding_window", True) is False
    ):
        return None, False
    return int(window), "full_attention" in kinds


def takes_mask_tensors(model: nn.Module) -> bool:
    """Whether the model's attention implementation takes a mask of its own for every pair of row and key."""
    implementation = _implementation(model)
    return "flash" not in implementation and implementation != "flex_attention"


def block_masks(model: nn.Module, past: Tensor, own: Tensor, plan: Plan | None = None) -> Any:
    """The masks of a block, or of a run of blocks, or None where the model's own mask is right.

    A model measures windows by places in the cache; behind an anchor these are not distances between tokens.

    Args:
        past: (P,) positions of the keys in the cache; own: (N, T) positions of the new tokens.
        plan: the plan, where tokens of several blocks see different keys; None: they see all keys before them.

    Returns:
        None, a mask (N, 1, T, P + T) for models with one kind of layer, or one mask for each kind of layer.
    """
    window, mixed = windows(model)
    if plan is None and (window is None or not len(past) or int(own.max() - past.min()) < window):
        return None
    keys = torch.cat([past.expand(len(own), -1), own], 1)[:, None, :]
    rows = own[:, :, None]
    if plan is None and bool((own[:, 0] == past[-1] + 1).all()) and len(past) == past[-1] + 1:
        return None
    seen = keys <= rows
    if plan is not None:
        seen &= (keys < plan.anchor_size) | (keys >= rows // plan.block_size * plan.block_size - plan.halo_size)
    if window is None:
        return _as_mask(model, seen)
    sliding = _as_mask(model, seen & (rows - keys < window))
    return {"full_attention": _as_mask(model, seen), "sliding_attention": sliding} if mixed else sliding


def _as_mask(model: nn.Module, seen: Tensor) -> Tensor:
    """(N, T, S) visibility as the model's attention takes it: (N, 1, T, S), bool or, for eager, to be added."""
    implementation, seen = _implementation(model), seen[:, None]
    if not takes_mask_tensors(model):
        raise NotImplementedError(
            f"{implementation} takes no mask tensor, which sliding layers behind an anchor need: encode with "
            'attn_implementation="tiled_attention" or "sdpa".'
        )
    if implementation != "eager":
        return seen
    dtype = next(model.parameters()).dtype
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def _implementation(model: nn.Module) -> str:
    return str(getattr(text_config(model), "_attn_implementation", ""))


@contextlib.contextmanager
def dense(model: nn.Module) -> Iterator[None]:
    """Run a model that is set to star_attention with the exact kernels: blocks are cut outside of it."""
    config = text_config(model)
    if getattr(config, "_attn_implementation", None) != "star_attention":
        yield
        return
    model.set_attn_implementation("tiled_attention")  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation("star_attention")  # type: ignore[operator]


def follows_length(model: nn.Module) -> bool:
    """Whether rotary frequencies follow a call's longest position (`dynamic` and `longrope`)."""
    return any(_moving(getattr(module, "rope_type", None)) for module in model.modules())


def _moving(kind: Any) -> set[str | None]:
    """The layer types (None for a module with one) whose frequencies follow the length."""
    kinds = kind if isinstance(kind, dict) else {None: kind}
    return {layer for layer, name in kinds.items() if name is not None and ("dynamic" in name or name == "longrope")}


@contextlib.contextmanager
def frozen_rope(model: nn.Module, length: int) -> Iterator[None]:
    """Hold rotary frequencies that follow a call's longest position (`dynamic`, `longrope`) at those of `length`.

    Every block, and the questions after them, must be rotated alike, whatever the positions of one call.
    """
    held = []
    module: Any
    for module in model.modules():
        kind: Any = getattr(module, "rope_type", None)
        moving = _moving(kind)
        if not moving:
            continue
        for layer in moving:
            extra = {} if layer is None else {"layer_type": layer}
            for position in (0, max(0, length - 1)):  # the first call forgets longer sequences seen before
                device = next(module.buffers()).device
                module(torch.zeros(1, device=device), torch.tensor([[position]], device=device), **extra)
        held.append((module, freeze_rope(module, moving)))
    try:
        yield
    finally:
        for module, kind in held:
            module.rope_type = kind
