"""`attend` with everything but tensors and mask given: what a plan of several pieces hands from call to call."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.kernels.attend import attend
from hf_attn_plugins.kernels.choose import choose


@dataclass(frozen=True)
class Kernel:
    """A kernel by `name` (None chooses one for every call) and the options of `kernels.attend`."""

    scale: float
    softcap: float | None = None
    dropout: float = 0.0
    name: str | None = None

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask | None = None) -> Partial:
        if not key.shape[2] or not query.shape[2]:
            return Partial.empty(query, value.shape[-1])
        return attend(
            query,
            key,
            value,
            mask=mask,
            scale=self.scale,
            softcap=self.softcap,
            dropout=self.dropout,
            kernel=self.name,
        )

    def named(self, name: str | None) -> Kernel:
        """The same by another name."""
        return dataclasses.replace(self, name=name)

    def chosen_for(self, query: Tensor, key: Tensor, value: Tensor, mask: Mask) -> Kernel:
        """The same with the kernel that suits a whole prompt: its pieces look too short for it one by one."""
        return self.named(self.name or choose(query, key, value, mask, self.softcap, self.dropout))
