"""The arguments of Transformers' attention call, validated and put into one `Mask`; nothing is dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_attn_plugins.core.mask import Mask, window_of
from hf_attn_plugins.hf.masks import compat
from hf_attn_plugins.hf.masks.structured_mask import structure_of
from hf_attn_plugins.hf.models import families

REFUSED = {
    "indices": "top-k sparse attention",
    "block_indices": "block-sparse attention",
    "cache": "continuous batching over a paged cache; `with hap.continuous_batching(model)` runs it",
}
# Float keywords that models pass along, or processors return, and that change nothing in the attention itself. Integer
# and boolean tensors (what a tokenizer or a collator returns beside the ids) change nothing either, unless the model
# itself names them.
HARMLESS = {
    "position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "encoder_hidden_states", "encoder_attention_mask", "deterministic", "num_items_in_batch", "logits_to_keep",
    "labels", "max_length_q", "max_length_k", "cu_seq_lens_k", "past_key_values", "position_embeddings",
    "cache_position", "input_ids", "inputs_embeds", "token_type_ids", "mm_token_type_ids", "pixel_values",
    "layer_idx", "shared_kv_states", "attention_mask", "head_mask", "per_layer_input", "per_layer_inputs",
    "pixel_values_videos", "input_features", "input_values", "audio_values", "image_embeds", "video_embeds",
    "second_per_grid_ts", "image_sizes", "decoder_input_ids", "cross_attention_mask", "full_text_row_masked_out_mask",
}  # fmt: skip

MASK_DTYPES = (torch.bool, torch.float32, torch.bfloat16, torch.float16, torch.float64)


class Seen(NamedTuple):
    """What a call may attend to, and what is known of it.

    Attributes:
        mask: the pairs, everything that hides keys in it.
        is_causal: causal self-attention, for which a method has a plan.
        recognised: what the mask was recognised as; empty for a tensor of a user's own.
    """

    mask: Mask
    is_causal: bool
    recognised: tuple[str, ...]


def refuse_unknown(name: str, module: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raise NotImplementedError for a keyword that would change the result and that no plugin honours."""
    for key, value in kwargs.items():
        if value is None or key in HARMLESS:
            continue
        if key == "cache" and hasattr(value, "get_seq_length"):
            continue  # a model's own cache, passed along: its keys and values are here already
        if key in REFUSED:
            raise NotImplementedError(
                f"{name} does not support `{key}` ({REFUSED[key]}): load this model with "
                f'attn_implementation="{families.own_backend(module)}".'
            )
        if isinstance(value, Tensor) and (value.is_floating_point() or families.names_keyword(type(module), key)):
            raise NotImplementedError(
                f"{name} does not know the tensor argument `{key}` and will not drop it: load this model with "
                f'attn_implementation="{families.own_backend(module)}".'
            )


def one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in one dtype: autocast's where it is on, else the query's.

    Under autocast queries and keys may arrive in float32 and values in bfloat16.
    """
    device = "cpu" if query.is_cpu else query.device.type  # `is_cpu` takes a seventh of the time, in every call
    if not query.is_meta and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif query.dtype == key.dtype == value.dtype:
        return query, key, value
    else:
        dtype = query.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def seen_by(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: Any,
    is_causal: bool | None,
    sliding_window: int | None,
) -> Seen:
    """What the rows of a call may attend to.

    Args:
        attention_mask: what our mask function made, a user's 4-d bool or float tensor, or None.
        is_causal: the call's own word; the module's where it is None. A plan is for causal self-attention only, so
            False makes the call exact whatever its mask.
        sliding_window: of the layer, for calls without a mask.

    Raises:
        ValueError: a mask of another dtype or width.
    """
    rows, keys = query.shape[2], key.shape[2]
    said = getattr(module, "is_causal", None) if is_causal is None else is_causal
    structure = structure_of(attention_mask)
    if structure is not None:
        if structure.shape[2:] == (rows, keys):
            mask, names = structure.mask, structure.recognised
            if isinstance(mask.offset, Tensor) and not torch.compiler.is_compiling():
                mask = mask.replace(offset=int(mask.offset))
            if said is not None and structure.skippable and rows > 1 and mask.causal != bool(said):
                # `sdpa` gets no mask here and follows `is_causal`, and so do we.
                mask, names = mask.replace(causal=bool(said)), ("causal" if said else "full",)
            causal = mask.causal or structure.is_causal
            return Seen(mask, causal and said is not False, names)
        # The mask was made for other lengths than the layer has. `sdpa` gets no mask where one is not needed, and a
        # tensor that broadcasts otherwise.
        widths = structure.shape[2:]
        if any(have not in (1, want) for have, want in zip(widths, (rows, keys), strict=True)):
            raise ValueError(
                f"the attention mask is for {widths} (queries, keys), the layer has {(rows, keys)}: this model changes "
                "its keys behind the mask's back; load it with "
                f'attn_implementation="{families.own_backend(module)}".'
            )
        attention_mask = None if structure.skippable else structure.tensor(query.device)
    if attention_mask is not None:
        return Seen(Mask(bias=_checked(attention_mask, query, keys)), False, ())
    if not said or rows == 1 or families.own_backend_in(type(module).__module__) == "eager":
        return Seen(Mask(), False, ("full",))  # without a mask, eager sees everything whatever is_causal says
    window = window_of(sliding_window)
    names = ("causal",) if sliding_window is None else ("causal", f"window {sliding_window}")
    return Seen(Mask(causal=True, window=window), True, names)


def _checked(mask: Any, query: Tensor, keys: int) -> Tensor:
    """A mask tensor, which a user or a model made, if it broadcasts to the call."""
    batch, heads, rows, _ = query.shape
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        given = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"an attention mask tensor must be 4-d and broadcast to (batch, heads, {rows}, {keys}), got {given}."
        )
    if mask.dtype not in MASK_DTYPES:
        raise ValueError(
            f"a 4-d attention mask is bool (True = attend) or float (added to the scores), got {mask.dtype}: "
            "pass mask.bool()."
        )
    if mask.shape[-1] > keys and compat.cuts_wide_masks():
        mask = mask[..., :keys]
    if any(have not in (1, want) for have, want in zip(mask.shape, (batch, heads, rows, keys), strict=True)):
        raise ValueError(
            f"the attention mask is {tuple(mask.shape)} and must broadcast to (batch, heads, queries, keys) = "
            f"{(batch, heads, rows, keys)}: this call has other queries or keys than the mask was made for."
        )
    return mask


def packed(seen: Seen, query: Tensor, key: Tensor, cu_seq_lens: Any, seq_idx: Tensor | None) -> Seen:
    """`seen` with the boundaries (n + 1,) or segment ids (B, Q) of packed sequences that the call names."""
    mask, rows = seen.mask, query.shape[2]
    if mask.query_segments is not None or rows != key.shape[2] or not mask.causal:
        return seen
    if seq_idx is not None:
        segments = seq_idx
    elif isinstance(cu_seq_lens, Tensor) and query.shape[0] == 1:
        position = torch.arange(rows, device=query.device)
        segments = torch.bucketize(position, cu_seq_lens.to(query.device), right=True).unsqueeze(0)
    else:
        return seen
    mask = mask.replace(query_segments=segments, key_segments=segments)
    return seen._replace(mask=mask, recognised=(*seen.recognised, "packed"))


def biased(seen: Seen, extra: Tensor) -> Seen:
    """`seen` with a position bias (1 or B, Hq, Q, K), added to the scaled scores."""
    bias = seen.mask.bias
    if bias is None:
        bias = extra
    else:
        bias = torch.where(bias, extra, -torch.inf) if bias.dtype == torch.bool else bias + extra
    return seen._replace(mask=seen.mask.replace(bias=bias), recognised=(*seen.recognised, "position bias"))


def sink_of(s_aux: Tensor | None, sinks: Tensor | None, query: Tensor, name: str) -> Tensor | None:
    """Learned sink logits in float32 that broadcast to (B, Hq, Q); None where the call has none.

    Raises:
        NotImplementedError: they are neither (Hq,), one per head, nor broadcast to (B, Hq, Q, 1), one per query.
    """
    given = s_aux if s_aux is not None else sinks
    if given is None:
        return None
    batch, heads, rows, _ = query.shape
    if given.shape == (heads,):
        return given.float().view(1, -1, 1)
    if given.ndim == 4 and all(n in (1, m) for n, m in zip(given.shape, (batch, heads, rows, 1), strict=True)):
        return given.float().squeeze(-1)
    raise NotImplementedError(
        f"{name} takes sink logits of shape ({heads},), one per head, or {(batch, heads, rows, 1)}, one per query, got "
        f"{tuple(given.shape)} as `{'s_aux' if s_aux is not None else 'sinks'}`: load this model with "
        'attn_implementation="eager".'
    )
