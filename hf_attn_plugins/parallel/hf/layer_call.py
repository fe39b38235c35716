"""What the layers of a model call inside a session: the attention function and the mask function that it installs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.options import OfLayer
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.hf.masks.recognise import Place, recognise
from hf_attn_plugins.hf.masks.structured_mask import Structure, StructuredMask
from hf_attn_plugins.kernels.bound_attend import BoundAttend
from hf_attn_plugins.parallel import turns
from hf_attn_plugins.parallel.decode import later
from hf_attn_plugins.parallel.hf.forward import Forward
from hf_attn_plugins.parallel.method import Step


@dataclass(frozen=True, eq=False)
class StepMask(Mask):
    """A mask that carries the `Step` of the forward in which it was built.

    Gradient checkpointing runs a layer a second time during the backward pass, when `Forward.step` is already None or
    belongs to a later forward. The mask is the one argument that such a layer is given again unchanged, so the layer
    finds its step in the mask.
    """

    step: Step | None = None


class LayerCall:
    """The two functions of a session; `forward` knows the forward under way.

    Attributes:
        merged_rows: rows merged over the ranks so far, summed over all layers.
    """

    def __init__(self, forward: Forward) -> None:
        self.forward, self.merged_rows = forward, 0

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Mask,
        *,
        scale: float,
        softcap: float | None,
        dropout: float,
        options: OfLayer,
    ) -> Partial:
        """The layers' attention call: by the method for a sharded prompt; for later tokens by `turns`, or by `decode`.

        The signature is that of a plugin's entry (see `Plugin.entry`).

        Raises:
            RuntimeError: the call comes from outside of the model's own forward.
        """
        method, group = self.forward.method, self.forward.group
        # A layer that gradient checkpointing runs again finds the step of its forward in the mask: see StepMask.
        step = mask.step if isinstance(mask, StepMask) else self.forward.step
        if step is None:
            raise RuntimeError("attention was called outside of the model's own forward: call the model itself.")
        if dropout and not step.is_prompt:
            raise NotImplementedError(
                f"attention dropout of {dropout} in decoding, a later turn or a prompt that every rank computes, which "
                "context_parallel drops in sharded prompts only: call model.eval()."
            )
        kernel = BoundAttend(scale, softcap, dropout, getattr(method, "kernel", None), self.forward.part)
        if step.layout is None:
            run = later
        elif step.is_prompt:
            run = method.for_layer(options.layer).attention
        else:
            run = turns.attention
        self.merged_rows += len(query) * (query.shape[2] if step.layout is None else step.layout.merged)
        return run(query, key, value, mask.window, step, kernel, group)

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int | Tensor = 0,
        kv_offset: int = 0,
        mask_function: Any = None,
        attention_mask: Tensor | None = None,
        config: Any = None,
        **_: Any,
    ) -> StructuredMask:
        """The mask function that Transformers calls: it reads the window from the model's mask.

        Padding and positions are not read here, since the `Step` has them.

        Raises:
            NotImplementedError: a mask that is neither causal nor a sliding window.
        """
        place = Place(batch_size, q_length, kv_length, q_offset, kv_offset, False)
        recognised = recognise(mask_function, place).mask if mask_function is not None else Mask(causal=True)
        if not recognised.has_no_tensors():
            raise NotImplementedError(
                f"{type(config).__name__} builds a mask that is neither causal nor a sliding window, which "
                "context_parallel cannot cut into shards: run this model in one process."
            )
        whole = StepMask(
            causal=recognised.causal, window=recognised.window, prefix=recognised.prefix, step=self.forward.step
        )
        return StructuredMask(Structure(whole, (batch_size, 1, q_length, kv_length), True, ("causal",)))
