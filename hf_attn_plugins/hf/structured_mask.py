"""The mask function that Transformers calls once per forward: it returns a structure, never a T x S tensor.

The structure travels through the model in place of a mask tensor, as FlexAttention's BlockMask does; being a BlockMask
to `isinstance` is what lets it pass the places where Transformers asks whether a mask has been prepared already.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from hf_attn_plugins.core.mask import Mask


class StructuredMask(BlockMask):
    """A `masks.Mask` for (B, 1, Q, K), as it travels from the mask function to the attention function."""

    def __init__(self, mask: Mask, shape: tuple[int, int, int, int]) -> None:
        self.mask, self._shape = mask, shape

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def ndim(self) -> int:
        return 4

    def __repr__(self) -> str:
        return f"StructuredMask(shape={self._shape}, {self.mask})"

    __str__ = __repr__

    def to(self, device: Any, *_: Any, **__: Any) -> StructuredMask:
        """A copy whose tensors are on `device` (Accelerate's hooks call this)."""

        def move(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        mask = self.mask
        moved = mask.replace(
            offset=move(mask.offset),
            key_padding=move(mask.key_padding),
            query_segments=move(mask.query_segments),
            key_segments=move(mask.key_segments),
        )
        return StructuredMask(moved, self._shape)

    def contiguous(self) -> StructuredMask:
        """Itself: `generate` makes prepared masks contiguous."""
        return self

    def __getitem__(self, index: Any) -> StructuredMask:
        """`mask[:, :, -n:]` keeps the last n queries, as some models ask for; nothing else can be cut out."""
        batch, heads, queries, keys = self._shape
        everything = slice(None)
        cut = index if isinstance(index, tuple) else (index,)
        if len(cut) < 3 or any(part != everything for i, part in enumerate(cut) if i != 2) or len(cut) > 4:
            raise NotImplementedError(
                f"this model cuts its attention mask as {index}, which a structured mask does not support: "
                'load it with attn_implementation="sdpa".'
            )
        start, stop, step = cut[2].indices(queries)
        if step != 1:
            raise NotImplementedError(f"a structured mask cannot be cut with step {step}.")
        mask = self.mask
        segments = None if mask.query_segments is None else mask.query_segments[:, start:stop]
        first = keys - queries if mask.offset is None else mask.offset
        return StructuredMask(
            mask.replace(offset=first + start, query_segments=segments), (batch, heads, max(0, stop - start), keys)
        )


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Tensor] | None = None,
    attention_mask: Tensor | None = None,
    config: Any = None,
    use_vmap: bool = False,
    **_: Any,
) -> StructuredMask:
    """The plugins' entry in Transformers' mask registry; arguments as in `transformers.masking_utils.sdpa_mask`.

    Raises:
        ValueError: the config's model never asks the attention registry, so that a plugin could not take effect.
    """
    compiling = torch.compiler.is_compiling()
    if config is not None and not compiling:
        _refuse_models_that_never_ask(type(config).__module__)
    if isinstance(q_offset, Tensor):
        q_offset = q_offset.clone()  # a static cache advances its own counter in place before attention runs
    mask = _parse(mask_function, q_length, kv_length, kv_offset) if mask_function is not None else Mask(causal=True)
    if mask is None:
        mask = Mask(predicate=_shifted(mask_function, kv_offset, use_vmap))  # type: ignore[arg-type]
    mask = mask.replace(
        offset=q_offset - kv_offset, key_padding=_padding(attention_mask, kv_length, kv_offset, compiling)
    )
    return StructuredMask(mask, (batch_size, 1, q_length, kv_length))


def _padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int, compiling: bool) -> Tensor | None:
    if attention_mask is None:
        return None
    missing = kv_length + kv_offset - attention_mask.shape[-1]
    padding = attention_mask.bool()
    if missing > 0:
        padding = F.pad(padding, (0, missing))
    padding = padding[:, kv_offset : kv_offset + kv_length]
    return None if not compiling and bool(padding.all()) else padding


def _parse(function: Callable[..., Tensor], q_length: int, kv_length: int, kv_offset: int) -> Mask | None:
    """Recognise the functions that Transformers composes masks from; None for any other.

    They are closures without public names, so they are told apart by their qualified name and read by the names of
    their cells; a future Transformers that renames them gets the slower, equally exact predicate.
    """
    from transformers import masking_utils

    if function is masking_utils.causal_mask_function:
        return Mask(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return Mask()
    cells = _cells(function)
    if cells is None:
        return None
    maker = function.__qualname__.split(".")[0]
    if maker == "and_masks":
        parts = [_parse(part, q_length, kv_length, kv_offset) for part in cells.get("mask_functions", ())]
        return _intersect(parts)
    if maker == "sliding_window_overlay":
        return Mask(window=(cells["sliding_window"] - 1, None))
    if maker == "sliding_window_bidirectional_overlay":
        return Mask(window=(cells["sliding_window"], cells["sliding_window"]))
    if maker == "packed_sequence_mask_function" and q_length == kv_length and not kv_offset:
        segments = cells["packed_sequence_mask"]
        return Mask(query_segments=segments, key_segments=segments)
    if maker == "remap_positions_for_packed_sequence":
        inner = _parse(cells["mask_function"], q_length, kv_length, kv_offset)
        # Inside a packed sequence positions count up by one, so distances are those of the indices.
        return inner if inner is not None and inner.has_no_tensors() else None
    return None


def _cells(function: Callable[..., Any]) -> dict[str, Any] | None:
    if torch.compiler.is_compiling():  # closures cannot be inspected while tracing
        return None
    closure, code = getattr(function, "__closure__", None), getattr(function, "__code__", None)
    if closure is None or code is None or not function.__module__.startswith("transformers."):
        return None
    return dict(zip(code.co_freevars, (cell.cell_contents for cell in closure), strict=True))


def _intersect(parts: list[Mask | None]) -> Mask | None:
    whole = Mask()
    for part in parts:
        if part is None:
            return None
        if part.window != (None, None) and whole.window != (None, None):
            return None
        if part.query_segments is not None and whole.query_segments is not None:
            return None
        whole = Mask(
            causal=whole.causal or part.causal,
            window=part.window if part.window != (None, None) else whole.window,
            query_segments=part.query_segments if part.query_segments is not None else whole.query_segments,
            key_segments=part.key_segments if part.key_segments is not None else whole.key_segments,
        )
    return whole


def _shifted(function: Callable[..., Tensor], kv_offset: int, use_vmap: bool) -> Callable[..., Tensor]:
    """The function over our indices, where key 0 is the first key of the cache; vmapped if it takes plain numbers."""

    def predicate(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if not use_vmap:
            return function(b, h, q + kv_offset, k + kv_offset)
        mapped = function
        for dims in ((None, None, None, 0), (None, None, 0, None), (None, 0, None, None), (0, None, None, None)):
            mapped = torch.vmap(mapped, in_dims=dims)
        return mapped(b.flatten(), h.flatten(), q.flatten() + kv_offset, k.flatten() + kv_offset)

    return predicate


@functools.cache
def _refuse_models_that_never_ask(config_module: str) -> None:
    package, _, module = config_module.rpartition(".")
    modeling = sys.modules.get(f"{package}.{module.replace('configuration_', 'modeling_', 1)}")
    if modeling is not None and not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        raise ValueError(
            f"models of {modeling.__name__} compute attention themselves and never ask Transformers' attention "
            'registry, so no plugin can take effect: load this model with attn_implementation="eager" or "sdpa".'
        )
