"""Transformers' attention call turned into ours: validated, cast, or refused; nothing is dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.core.mask import Mask, window_of
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.core.warn import warn_once
from hf_attn_plugins.hf.structured_mask import StructuredMask
from hf_attn_plugins.plugins import EXACT, Plugin, plugin

REFUSED = {
    "indices": "top-k sparse attention",
    "block_indices": "block-sparse attention",
    "cache": "continuous batching over a paged cache",
}
# Keywords that models pass along and that change nothing in the attention itself.
HARMLESS = {
    "position_ids", "use_cache", "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
    "encoder_hidden_states", "encoder_attention_mask", "deterministic", "num_items_in_batch", "logits_to_keep",
    "labels", "max_length_q", "max_length_k", "cu_seq_lens_k", "past_key_values", "position_embeddings",
    "cache_position", "input_ids", "inputs_embeds", "token_type_ids", "mm_token_type_ids", "pixel_values",
    "layer_idx", "shared_kv_states", "attention_mask", "head_mask", "per_layer_input", "per_layer_inputs",
    "image_sizes", "decoder_input_ids", "cross_attention_mask", "full_text_row_masked_out_mask",
}  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A row of the table, resolved: importing by name is something torch.compile cannot trace."""

    name: str
    attention: Callable[..., Partial]
    options_type: Callable[..., Any]

    @classmethod
    def of(cls, row: Plugin) -> Method:
        """The function and the options of a row."""
        return cls(row.name, row.attention(), row.options_type())

    def options(self, config: Any) -> Any:
        """This method's options as stored in a config, defaults where it holds none."""
        stored: Mapping[str, Any] = getattr(config, "hf_attn_plugins", None) or {}
        return self.options_type(**stored.get(self.name, {}))


def attention_function(row: Plugin) -> Callable[..., tuple[Tensor, None]]:
    """The function that Transformers calls for `attn_implementation=row.name`; see `forward` for its arguments."""
    method, exact = Method.of(row), Method.of(plugin(EXACT))

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return forward(method, exact, module, query, key, value, attention_mask, **kwargs)

    attention.__name__ = attention.__qualname__ = row.name
    return attention


def forward(
    method: Method,
    exact: Method,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: StructuredMask | Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One attention call of a Transformers model through a plugin.

    Args:
        method, exact: the plugin, and what computes the calls that are not causal.
        query: (B, Hq, Q, D); key, value: (B, Hkv, K, D or Dv), with everything the cache holds.
        attention_mask: a `StructuredMask` from our mask function, or a user's (B, 1 or H, Q, K) bool or float tensor.
        s_aux, sinks: learned sink logits (Hq,), which enter the softmax's denominator once.
        position_bias: float (1 or B, Hq, Q, K), added to the scaled scores.
        cu_seq_lens_q, seq_idx: boundaries (n + 1,) or segment ids (B, Q) of packed sequences.

    Returns:
        ((B, Q, Hq, Dv) contiguous, None): attention weights are never formed.

    Raises:
        NotImplementedError: a keyword that would change the result and that the plugin cannot honour.
    """
    name = method.name
    _refuse(name, kwargs)
    if kwargs.get("output_attentions") and not torch.compiler.is_compiling():
        warn_once(f"{name} never forms attention weights: output_attentions gives None. Use 'eager' to inspect them.")
    query, key, value = _one_dtype(query, key, value)
    mask = _mask_of(module, query, key, attention_mask, is_causal, sliding_window)
    mask = _packed(mask, query, key, cu_seq_lens_q, seq_idx)
    if position_bias is not None:
        mask = mask.replace(bias=_add_bias(mask.bias, position_bias))
    sink = _sink(s_aux, sinks, query.shape[1], name)
    # Bidirectional encoders, cross-attention and vision towers take the exact path under every name.
    chosen = method if mask.causal else exact
    out, lse = chosen.attention(
        query,
        key,
        value,
        mask,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        dropout=dropout,
        options=chosen.options(getattr(module, "config", None)),
    )
    if sink is not None:
        out = (out * torch.sigmoid(lse - sink.view(1, -1, 1)).unsqueeze(-1)).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def _refuse(name: str, kwargs: Mapping[str, Any]) -> None:
    for key, value in kwargs.items():
        if value is None or key in HARMLESS:
            continue
        if key == "cache" and hasattr(value, "get_seq_length"):
            continue  # a model's own cache, passed along: its keys and values are here already
        if key in REFUSED:
            raise NotImplementedError(
                f'{name} does not support `{key}` ({REFUSED[key]}): load this model with attn_implementation="sdpa".'
            )
        if isinstance(value, Tensor):
            raise NotImplementedError(
                f"{name} does not know the tensor argument `{key}` and will not drop it: load this model with "
                'attn_implementation="eager" or "sdpa".'
            )


def _one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Under autocast queries and keys may arrive in float32 and values in bfloat16."""
    device = query.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    elif query.dtype == key.dtype == value.dtype:
        return query, key, value
    else:
        dtype = query.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _mask_of(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    attention_mask: StructuredMask | Tensor | None,
    is_causal: bool | None,
    sliding_window: int | None,
) -> Mask:
    rows, keys = query.shape[2], key.shape[2]
    if isinstance(attention_mask, StructuredMask):
        if attention_mask.shape[2:] != (rows, keys):
            raise ValueError(
                f"the attention mask is for {attention_mask.shape[2:]} (queries, keys), the layer has {(rows, keys)}: "
                'this model changes its keys behind the mask\'s back; load it with attn_implementation="sdpa".'
            )
        mask = attention_mask.mask
        if isinstance(mask.offset, Tensor) and not torch.compiler.is_compiling():
            mask = mask.replace(offset=int(mask.offset))
        return mask
    if attention_mask is not None:
        if attention_mask.ndim != 4:
            raise ValueError(
                f"an attention mask tensor must be 4-d and broadcast to (batch, heads, {rows}, {keys}), "
                f"got {tuple(attention_mask.shape)}."
            )
        return Mask(bias=attention_mask[..., :keys])
    # The mask function never returns None: this model built no mask for this call.
    causal = getattr(module, "is_causal", False) if is_causal is None else is_causal
    if not causal or rows == 1:
        return Mask()
    return Mask(causal=True, window=window_of(sliding_window))


def _packed(mask: Mask, query: Tensor, key: Tensor, cu_seq_lens: Tensor | None, seq_idx: Tensor | None) -> Mask:
    rows = query.shape[2]
    if mask.query_segments is not None or rows != key.shape[2] or not mask.causal:
        return mask
    if seq_idx is not None:
        segments = seq_idx
    elif isinstance(cu_seq_lens, Tensor) and query.shape[0] == 1:
        position = torch.arange(rows, device=query.device)
        segments = torch.bucketize(position, cu_seq_lens.to(query.device), right=True).unsqueeze(0)
    else:
        return mask
    return mask.replace(query_segments=segments, key_segments=segments)


def _add_bias(bias: Tensor | None, extra: Tensor) -> Tensor:
    if bias is None:
        return extra
    return torch.where(bias, extra, -torch.inf) if bias.dtype == torch.bool else bias + extra


def _sink(s_aux: Tensor | None, sinks: Tensor | None, heads: int, name: str) -> Tensor | None:
    given = s_aux if s_aux is not None else sinks
    if given is None:
        return None
    if given.shape != (heads,):
        raise NotImplementedError(
            f"{name} takes sink logits of shape ({heads},), one per head, got {tuple(given.shape)} as "
            f'`{"s_aux" if s_aux is not None else "sinks"}`: load this model with attn_implementation="eager".'
        )
    return given.float()
