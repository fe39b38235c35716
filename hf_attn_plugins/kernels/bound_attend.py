"""`attend` with its options bound: a plan of several calls passes one `BoundAttend` on instead of five arguments."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_attn_plugins.core.drops import Drops
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.kernels.attend import attend
from hf_attn_plugins.kernels.choose import PLAIN, choose, choose_rectangles


@dataclass(frozen=True)
class BoundAttend:
    """The options of `kernels.attend`.

    Attributes:
        scale, softcap, dropout: as in `kernels.attend`.
        name: a kernel's name; None chooses one in every call.
        part: (number of the part, number of parts) of a layer's query heads that the calls have; for `draw`.
    """

    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    name: str | None = None
    part: tuple[int, int] = (0, 1)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None = None) -> Partial:
        if not key.shape[2] or not query.shape[2]:
            return Partial.empty(query, value.shape[-1])
        return attend(query, key, value, mask=mask, **self.options)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments that `attend` and `attend_rectangles` share."""
        return {"scale": self.scale, "softcap": self.softcap, "dropout": self.dropout, "kernel": self.name}

    def draw(self, query: Tensor, tokens: int) -> Drops | None:
        """The places of self-attention over `tokens` tokens, with a new seed; None without dropout.

        Several ranks draw the same seed if their generators are in the same state.

        Args:
            query: (B, Hq, ..., D), all query heads of the part.
        """
        return Drops.draw(query, tokens, tokens, *self.part) if self.dropout else None

    def with_kernel_for(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> BoundAttend:
        """A copy that names the kernel chosen for a whole prompt: the parts of a plan alone would look too short.

        On GPUs the length is no question, and each part is chosen by itself.
        """
        if query.device.type not in PLAIN:
            return self
        choice = choose(query, key, value, mask, self.softcap, self.dropout, self.name)
        return dataclasses.replace(self, name=choice.name)

    def takes_rectangles(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> bool:
        """Whether `attend_rectangles` computes a plan for these tensors in one launch."""
        return choose_rectangles(query, key, value, mask, self.softcap, self.dropout, self.name) is not None
