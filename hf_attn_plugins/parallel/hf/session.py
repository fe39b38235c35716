"""`context_parallel`: one long prompt on all processes of an `accelerate launch`."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from hf_attn_plugins import _version
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.options import OfLayer
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.hf.check import check
from hf_attn_plugins.hf.configure import use
from hf_attn_plugins.hf.masks.recognise import Place, recognise
from hf_attn_plugins.hf.masks.structured_mask import Structure, StructuredMask
from hf_attn_plugins.hf.models.unwrap import language_model
from hf_attn_plugins.hf.register import installed
from hf_attn_plugins.kernels.bound_attend import BoundAttend
from hf_attn_plugins.parallel.comm.consistency import agree
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.comm.traffic import Traffic
from hf_attn_plugins.parallel.decode import later
from hf_attn_plugins.parallel.hf.forward import Forward
from hf_attn_plugins.parallel.hf.layer_call import StepMask
from hf_attn_plugins.parallel.hf.training import same_batches, sum_gradients
from hf_attn_plugins.parallel.hf.weights import check_device, is_sharded, refuse_placement
from hf_attn_plugins.parallel.method import Method, method_for
from hf_attn_plugins.plugins import Plugin, plugin
from hf_attn_plugins.star.hf.fingerprint import fingerprint
from hf_attn_plugins.star.hf.model import check_model, text_config
from hf_attn_plugins.ui.shown import Shown

_NUMBERS = itertools.count()


class Session(Shown):
    """The object that `with context_parallel(...) as session` gives.

    Attributes:
        group: the ranks; `group.rank` and `group.size` are this process and their number.
        method: the attention method on these ranks; `plugin` is its name.
    """

    def __init__(self, model: nn.Module, group: Group, method: Method, plugin: str, averaged: bool = False) -> None:
        self.group, self.method, self.plugin, self.averaged = group, method, plugin, averaged
        self.forward = Forward(model, group, method)
        self.forward.grad_scale = float(group.size) if averaged else 1.0
        self.name = f"context_parallel_{next(_NUMBERS)}"

    @property
    def rank(self) -> int:
        """This process among all of them, from 0."""
        return self.group.rank

    @property
    def size(self) -> int:
        """The number of processes."""
        return self.group.size

    def traffic(self) -> Traffic:
        """Bytes that this rank has sent and received so far, by kind of exchange."""
        return self.group.traffic

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values of the last cache that this rank stores; 0 in one process."""
        return self.forward.cache.bytes if self.forward.cache is not None else 0

    @property
    def columns(self) -> Tensor | None:
        """(B, T) long: the columns of the prompt that this rank computed in its last forward; -1 for padding.

        In training the model returns the logits of these columns only; each column is on one rank.
        """
        return self.forward.columns

    def sum_gradients(self) -> None:
        """Replace every parameter's gradient by its sum over all ranks.

        Call it on every rank, after the last backward pass of an optimizer step and before clipping: a rank's gradient
        comes from its own tokens only.

        Raises:
            ValueError: the session was opened with `averaged=True`.
        """
        if self.averaged:
            raise ValueError(
                "sum_gradients() after averaged=True would add up what DDP, FSDP or Trainer averages: use one of them."
            )
        sum_gradients(self.forward.model, self.group)

    def same_batches(self, loader: Any) -> Any:
        """A loader that Accelerate or Trainer prepared, changed: all ranks of a group get the same batches."""
        return same_batches(loader, self.group)

    @property
    def loads(self) -> list[int]:
        """Keys per batch row of the last cache, for each rank; empty in one process."""
        return list(self.forward.cache.loads) if self.forward.cache is not None else []

    @property
    def prefill_tokens(self) -> int:
        """Tokens per row of the last prompt that this rank computed, including tokens that other ranks computed too."""
        return self.forward.prefill_tokens

    def summary(self) -> str:
        """What this rank computed, stores and sent, as lines to print."""
        if self.size == 1:
            return f"one process: plain {self.plugin}, nothing is sent"
        merge = self.traffic()["merge"]
        lines = [
            f"rank {self.rank} of {self.size}: {self.prefill_tokens} tokens of the last prompt computed, "
            f"{self.cache_bytes} bytes of keys and values held",
            str(self.traffic()),
        ]
        if merge.calls and self.forward.merged_rows:
            each = merge.sent / (self.size - 1) / self.forward.merged_rows
            lines.append(f"merge: {each:g} bytes per token and layer, from each rank to each other one")
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"context_parallel with {self.plugin}: {self.summary()}"

    __repr__ = __str__

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
        """The layers' attention call: `method.attention` for a sharded prompt, `decode.later` for all later rows.

        The signature is that of a plugin's entry (see `Plugin.entry`).

        Raises:
            RuntimeError: the call comes from outside of the model's own forward.
        """
        # A layer that gradient checkpointing runs again finds the step of its forward in the mask: see StepMask.
        step = mask.step if isinstance(mask, StepMask) else self.forward.step
        if step is None:
            raise RuntimeError("attention was called outside of the model's own forward: call the model itself.")
        if dropout and step.layout is not None:
            raise NotImplementedError(
                f"attention dropout of {dropout} draws other masks on several ranks than in one process: set "
                "config.attention_dropout=0 to train inside context_parallel."
            )
        kernel = BoundAttend(scale, softcap, dropout, getattr(self.method, "kernel", None))
        run = later if step.layout is None else self.method.for_layer(options.layer).attention
        self.forward.merged_rows += len(query) * (query.shape[2] if step.layout is None else step.layout.merged)
        return run(query, key, value, mask.window, step, kernel, self.group)

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


@contextlib.contextmanager
def context_parallel(
    model: nn.Module,
    name: str,
    *,
    timeout: float = 60.0,
    ranks: int | None = None,
    averaged: bool = False,
    **options: Any,
) -> Iterator[Session]:
    """Run a model's long prompts on all processes of this launch; each process stores a part of the keys and values.

    Every rank opens it with the same model and options, and calls `model(...)` or `model.generate(...)` with the same
    inputs. Every rank gets the same tokens. In one process it does what `hap.use` does. On exit the model is as before.

    Args:
        model: a causal decoder on this process's device, the same weights everywhere.
        name: "cqs_attention", "star_attention" or "tiled_attention".
        timeout: seconds that a rank waits in one exchange before it raises an error that names the missing rank.
        ranks: processes that share a prompt; None for all. Example: with 2, a launch of 4 has the groups 0 1 and 2 3,
            each with a prompt of its own (data parallel).
        averaged: in training, whether DDP, FSDP2 or Trainer averages the gradients over the whole launch. The loss's
            gradient is then multiplied by `ranks`, so that the average is the gradient of the mean loss of the groups.
        **options: the options of the plugin; in addition, for star_attention `anchor` ("auto", "recompute" or
            "broadcast"), for tiled_attention `exchange` ("auto", "gather" or "heads"), and for cqs_attention `rounds`
            (see `parallel.cqs.CQS`).

    In training mode `model(**batch, labels=labels).loss` is the loss over all tokens of the group's batch. Call
    `session.sum_gradients()` between `loss.backward()` and the optimizer's step, or pass `averaged=True`. Loss and
    gradients are those of one process. Dropout is refused.

    Yields:
        The `Session`.

    Raises:
        ValueError: an unknown name or option, or ranks that differ in model, options or library versions.
        NotImplementedError: a model whose context is not made of causal keys and values.
        parallel.RankError: inside the block, if another rank fails or does not answer; it names the rank.
    """
    method, model = method_for(name, **options), language_model(model)
    check(model, name).raise_if_refused()
    refuse_placement(model, averaged)
    group = Group.join(timeout, ranks)
    error: BaseException | None = None
    try:
        if group.size == 1:
            known = plugin(name).options_type().names()
            with use(model, name, **{key: value for key, value in options.items() if key in known}):
                yield Session(model, group, method, name, averaged)
        else:
            settings = {"method": name, "options": options, "averaged": averaged}
            with _session(model, group, method, settings, averaged) as session:
                yield session
    except BaseException as raised:
        error = raised
        raise
    finally:
        group.leave(error)


@contextlib.contextmanager
def _session(
    model: nn.Module, group: Group, method: Method, settings: dict[str, Any], averaged: bool = False
) -> Iterator[Session]:
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_attn_plugins": _version.__version__,
    }
    check_device(model, group)
    weights = "sharded" if is_sharded(model) else fingerprint(model, whole=True)  # shards differ from rank to rank
    agree(group, {**settings, "model": weights, **versions, "size": group.size}, what="set-up")
    check_model(model)
    method = method.settle(text_config(model).to_dict(), group)
    session = Session(model, group, method, settings.get("method", type(method).__name__), averaged)
    row = Plugin(session.name, "one session of context_parallel", True, "", session.attention, OfLayer)
    with installed(row, session.mask):
        try:
            with use(model, session.name):
                session.forward.attach()
                yield session
        finally:
            session.forward.detach()
