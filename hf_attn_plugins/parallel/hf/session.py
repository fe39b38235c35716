"""`Session`: what `with context_parallel(...) as session` gives."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.comm.traffic import Traffic
from hf_attn_plugins.parallel.hf import store
from hf_attn_plugins.parallel.hf.forward import Forward
from hf_attn_plugins.parallel.hf.layer_call import LayerCall
from hf_attn_plugins.parallel.hf.store import Saved
from hf_attn_plugins.parallel.hf.training import same_batches, sum_gradients
from hf_attn_plugins.parallel.method import Method
from hf_attn_plugins.ui.shown import Shown

_NUMBERS = itertools.count()


class Session(Shown):
    """The object that `with context_parallel(...) as session` gives.

    Attributes:
        group: the ranks; `group.rank` and `group.size` are this process and their number.
        method: the attention method on these ranks; `plugin` is its name.
        min_turn: tokens of a later turn, all batch rows together, from which on it is dealt; None for never.
    """

    def __init__(
        self,
        model: nn.Module,
        group: Group,
        method: Method,
        plugin: str,
        averaged: bool = False,
        min_turn: int | None = None,
    ) -> None:
        self.group, self.method, self.plugin, self.averaged, self.min_turn = group, method, plugin, averaged, min_turn
        self.forward = Forward(model, group, method, min_turn)
        self.forward.grad_scale = float(group.size) if averaged else 1.0
        self.calls = LayerCall(self.forward)
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
        """A loader that Accelerate or Trainer prepared, changed: all ranks of a group get the same batches.

        Raises:
            ValueError: a loader that is not divided (see `training.same_batches`), or tensor parallel weights.
        """
        if self.forward.part[1] > 1:
            raise ValueError(
                "same_batches() does not know which groups share tensor parallel weights: give all of these ranks the "
                "same batches yourself."
            )
        return same_batches(loader, self.group)

    @property
    def loads(self) -> list[int]:
        """Keys per batch row of the last cache, for each rank; empty in one process."""
        return list(self.forward.cache.loads) if self.forward.cache is not None else []

    @property
    def prefill_tokens(self) -> int:
        """Tokens per row of the last prompt or dealt turn that this rank computed.

        Tokens that other ranks computed too are counted. A turn that every rank computes does not change it.
        """
        return self.forward.prefill_tokens

    def save(
        self,
        cache: Any,
        folder: str | Path,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        tokenizer: Any = None,
    ) -> None:
        """Write a conversation into a new folder; every rank writes the keys and values that it stores.

        Every rank must call it, and all ranks must see the folder.

        Args:
            cache: the cache that the model or `generate` returned in this session.
            folder: a folder that holds no conversation yet.
            input_ids: (B, L) the tokens of the conversation so far. The cache may lack the last ones: `generate`
                returns one token more than it caches.
            attention_mask: (B, L), 0 for padding; needed where a prompt was padded.
            tokenizer: writes its fingerprint, which `load` then compares.

        Raises:
            ValueError: the folder holds a conversation, or tokens and mask that do not fit the cache.
            NotImplementedError: a cache that has dropped keys, or weights sharded by FSDP2.
        """
        store.save(self.forward.model, self.group, cache, folder, input_ids, attention_mask, tokenizer)

    def load(self, folder: str | Path, *, tokenizer: Any = None) -> Saved:
        """Read a conversation that `save` wrote, with this or another number of ranks; every rank must call it.

        With another number of ranks the keys are dealt anew, equally many to each rank. With one rank the cache is a
        `DynamicCache`.

        Args:
            folder: what `save` was given.
            tokenizer: compared with the one that was saved, if both are there.

        Returns:
            `Saved(cache, input_ids, attention_mask)`, tensors on the model's device.

        Raises:
            FileNotFoundError: there is no such folder, or it holds no conversation.
            ValueError: another model or tokenizer, or a damaged folder; the message names the file.
        """
        sharded = bool(self.forward.handles)
        return store.load(self.forward.model, self.group, folder, tokenizer=tokenizer, sharded=sharded)

    def summary(self) -> str:
        """What this rank computed, stores and sent, as lines to print."""
        if self.size == 1:
            return f"one process: plain {self.plugin}, nothing is sent"
        merge = self.traffic()["merge"]
        lines = [
            f"rank {self.rank} of {self.size}: {self.prefill_tokens} tokens of the last prompt or dealt turn computed, "
            f"{self.cache_bytes} bytes of keys and values held",
            str(self.traffic()),
        ]
        if merge.calls and self.calls.merged_rows:
            each = merge.sent / (self.size - 1) / self.calls.merged_rows
            lines.append(f"merge: {each:g} bytes per token and layer, from each rank to each other one")
        dealt, repeated = self.forward.dealt_turns, self.forward.repeated_turns
        if dealt + repeated:
            limit = "never dealt" if self.min_turn is None else f"dealt from {self.min_turn} tokens on"
            lines.append(f"later turns ({limit}): {dealt} dealt, {repeated} computed by every rank")
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"context_parallel with {self.plugin}: {self.summary()}"

    __repr__ = __str__
