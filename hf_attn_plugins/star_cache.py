"""The cache of an encoded context: a Transformers cache whose every layer keeps all tokens and follows the batch.

It stands beside the folder `star/` because it needs Transformers' classes to derive from; `star/cache.py` fills it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_attn_plugins.star.cache import Record


class StarLayer(DynamicLayer):
    """Keys and values of one layer; they are repeated when beams or samples make more rows of one context."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.keys.ndim == 4 and (copies := len(key_states) // len(self.keys)) > 1:
            self.batch_repeat_interleave(copies)
        return super().update(key_states, value_states, *args, **kwargs)


class StarCache(DynamicCache):
    """A `DynamicCache` without sliding layers: the mask cuts windows, so that cropping and branching stay possible.

    Attributes:
        star: what was encoded, or None while it is being encoded.
    """

    def __init__(self, layers: list[tuple[Tensor, Tensor]], record: Record | None = None) -> None:
        super().__init__()
        self.layer_class_to_replicate = StarLayer
        self.star = record
        for index, (key, value) in enumerate(layers):
            # A first update without tokens sets the layer up, the tensors themselves are not copied.
            self.update(key[:, :, :0], value[:, :, :0], index)
            layer: Any = self.layers[index]
            layer.keys, layer.values = key, value
