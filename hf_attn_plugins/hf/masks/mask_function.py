"""The mask function that Transformers calls once per forward and kind of layer, under every plugin's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.hf.masks import compat
from hf_attn_plugins.hf.masks.recognise import Place, Recognised, recognise, recognise_traced
from hf_attn_plugins.hf.masks.structured_mask import Structure, StructuredMask, TracedMask, travelling
from hf_attn_plugins.hf.models import families


def mask_function(
    batch_size: int,
    q_length: int | None = None,
    kv_length: int = 0,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    config: Any = None,
    use_vmap: bool = False,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    device: Any = None,
    dtype: torch.dtype = torch.float32,
    cache_position: Tensor | None = None,
    **rest: Any,
) -> StructuredMask | TracedMask | Tensor:
    """The plugins' entry in Transformers' mask registry; arguments as in `transformers.masking_utils.sdpa_mask`.

    All are given by keyword. Which of them describe the queries depends on the version: see `compat.query_range`.

    Returns:
        The mask as a structure, (batch_size, 1, q_length, kv_length); never None, which would mean several things.
        Written out as a tensor where a graph is traced through a model that looks at the structure's type.

    Raises:
        ValueError: the config's model never asks the attention registry, so that a plugin could not take effect.
    """
    tracing = torch.compiler.is_compiling()
    if config is not None and not tracing:
        families.refuse_models_that_never_ask(type(config).__module__)
    q_length, q_offset = compat.query_range(q_length, q_offset, cache_position, kv_length, kv_offset)
    if device is None:
        device = attention_mask.device if attention_mask is not None else torch.get_default_device()
    bidirectional = "allow_is_bidirectional_skip" in rest  # only the makers of bidirectional masks pass it
    place = Place(batch_size, q_length, kv_length, q_offset, kv_offset, use_vmap, device)
    if mask_function is None:
        read = Recognised(Mask(causal=not bidirectional), not bidirectional, ())
    elif torch.compiler.is_dynamo_compiling():
        read = recognise_traced(
            mask_function,
            place,
            is_causal=not bidirectional,
            local_size=local_size,
            skippable=allow_is_causal_skip,
            config=config,
        )
    else:
        read = recognise(mask_function, place)
    _check_padding(attention_mask, batch_size)
    padding = _padding(attention_mask, kv_length, kv_offset, tracing)
    # Families without sdpa add their masks to the scores, and never leave one out.
    floats = config is not None and families.own_backend_of(type(config).__module__) == "eager"
    structure = Structure(
        mask=read.mask.replace(offset=q_offset - kv_offset, key_padding=padding),
        shape=(batch_size, 1, q_length, kv_length),
        is_causal=read.is_causal,
        recognised=read.names,
        skippable=not floats and _skippable(read, padding, q_length, kv_length, allow_is_causal_skip, rest),
    )
    mask = travelling(structure, device, dtype if floats else torch.bool)
    if isinstance(mask, TracedMask) and config is not None and families.asks_for_type_of_mask(type(config).__module__):
        return mask.tensor()
    return mask


def _check_padding(mask: Any, batch: int) -> None:
    """Raise ValueError for a padding mask that is not one row of keys for each sequence, or one for all."""
    if mask is not None and (mask.ndim != 2 or mask.shape[0] not in (1, batch)):
        raise ValueError(
            f"an attention mask is ({batch}, keys), 1 where a token is to be seen, or 4-d, ({batch}, 1 or heads, "
            f"queries, keys); got {tuple(mask.shape)}: a mask of queries and keys is mask[None, None]."
        )


def _padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int, tracing: bool) -> Tensor | None:
    if attention_mask is None:
        return None
    missing = kv_length + kv_offset - attention_mask.shape[-1]
    padding = attention_mask.bool()
    if missing > 0:
        padding = F.pad(padding, (0, missing))
    padding = padding[:, kv_offset : kv_offset + kv_length]
    return None if not tracing and not padding.is_meta and bool(padding.all()) else padding


def _skippable(
    read: Recognised, padding: Tensor | None, queries: int, keys: int, causal_skip: bool, rest: dict[str, Any]
) -> bool:
    """Whether `sdpa_mask` would give None: a plain mask without padding, for one query or for as many as keys."""
    if padding is not None or not read.mask.has_no_tensors() or read.mask.prefix:
        return False
    allowed = rest.get("allow_is_bidirectional_skip", causal_skip)
    left, _ = read.mask.window
    reaches = left is None or left >= keys - 1
    return bool(allowed) and reaches and (not read.mask.causal or queries == 1 or queries == keys)
