"""What one layer's attention call carries inside a session: the forward that it belongs to."""

from __future__ import annotations

from dataclasses import dataclass

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.parallel.method import Step


@dataclass(frozen=True, eq=False)
class StepMask(Mask):
    """A mask that carries the `Step` of the forward in which it was built.

    Gradient checkpointing runs a layer a second time during the backward pass, when `Forward.step` is already None or
    belongs to a later forward. The mask is the one argument that such a layer is given again unchanged, so the layer
    finds its step in the mask.
    """

    step: Step | None = None
