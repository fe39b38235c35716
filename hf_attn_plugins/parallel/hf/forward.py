"""A model's forward inside `context_parallel`: inputs are divided into slots, hidden states are collected again.

Two pairs of hooks do it. The decoder's hooks replace its inputs by this rank's slots, their true positions and a
sharded cache; afterwards they collect the hidden states that the head needs. The model-level hooks record how many
logits are wanted and broadcast rank 0's logits. In training nothing is collected: head and loss see this rank's tokens
only.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.hf.compat import cache_keyword, set_returned_cache
from hf_attn_plugins.parallel import turns
from hf_attn_plugins.parallel.comm.collectives import tie
from hf_attn_plugins.parallel.comm.consistency import agree, digest, same_random_state
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.hf.cache import ShardedCache
from hf_attn_plugins.parallel.hf.inputs import arguments_of, cache_for, real_tokens, take, texts_of
from hf_attn_plugins.parallel.hf.packed import Apart, at
from hf_attn_plugins.parallel.hf.training import ShardedLoss, refuse_dropout
from hf_attn_plugins.parallel.hf.weights import is_offloaded, tensor_part
from hf_attn_plugins.parallel.method import Layout, Method, Step
from hf_attn_plugins.star.hf.model import decoder, follows_length, frozen_rope


class Forward:
    """The hooks, and the state that they share within one forward.

    Attributes:
        step: the forward under way; None outside of a forward.
        prefill_tokens: slots of this rank's last sharded prompt or dealt turn, with padding and recomputed tokens.
        dealt_turns, repeated_turns: later turns of several tokens so far that were dealt, and that every rank computed.
        cache: the cache of the last forward.
        columns: (B, T) long, the column of each row of the last forward on this rank, in training of each row of the
            logits; -1 for padding.
        part: (number of this rank's part of the heads, number of parts) under tensor parallel weights, else (0, 1).
        grad_scale: factor of the loss's gradient.
        min_turn: tokens of a later turn, all batch rows together, from which on it is dealt; None for never.
    """

    def __init__(self, model: nn.Module, group: Group, method: Method, min_turn: int | None = None) -> None:
        self.model, self.group, self.method, self.min_turn = model, group, method, min_turn
        self.decoder, part = decoder(model), tensor_part(model)
        self.part = (0, 1) if part is None else (part.place, len(part.ranks))
        self.signature, self.cache_keyword = inspect.signature(self.decoder.forward), cache_keyword(self.decoder)
        self.step: Step | None = None
        self.cache: ShardedCache | None = None
        self.prefill_tokens = self.dealt_turns = self.repeated_turns = 0
        self._logits_kept: int | None = None  # the last columns whose hidden states the head needs; None for all
        self._share_logits = False  # whether rank 0's logits are broadcast
        self._use_cache = True
        self._trains = False  # whether this forward's hidden states stay sharded, for training
        self._loss: ShardedLoss | None = None
        self.columns: Tensor | None = None
        self._apart: Apart | None = None  # packed texts of a method that takes one text per row
        self._owned: Tensor | None = None  # (B, T), the columns of the hidden states that training returns
        self.grad_scale = 1.0
        self._count = 0
        self._rope: Any = None
        self.handles: list[Any] = []

    def attach(self) -> None:
        """Register the hooks on the model and its decoder."""
        pre, post = {"with_kwargs": True, "prepend": False}, {"with_kwargs": True}
        if self.decoder is not self.model:
            self.handles.append(self.model.register_forward_pre_hook(self._before_model, **pre))
            self.handles.append(self.model.register_forward_hook(self._after_model, **post))
        self.handles.append(self.decoder.register_forward_pre_hook(self._before, **pre))
        self.handles.append(self.decoder.register_forward_hook(self._after, **post))
        # This hook also runs if the decoder raised, so that no state of a broken forward remains.
        self.handles.append(self.decoder.register_forward_hook(self._close, always_call=True))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _before_model(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        labels = kwargs.get("labels")
        self._trains, self._loss = self._learns(labels is not None), None
        if self._trains and labels is not None:
            self._loss = ShardedLoss(model, labels, kwargs.get("num_items_in_batch"))
            kwargs = {name: x for name, x in kwargs.items() if name not in ("labels", "num_items_in_batch")}
        keep = kwargs.get("logits_to_keep")
        self._share_logits = isinstance(keep, int) and keep > 0
        self._logits_kept = keep if self._share_logits and kwargs.get("labels") is None else None
        return args, kwargs

    def _learns(self, with_labels: bool) -> bool:
        return self.method.trains and torch.is_grad_enabled() and (self.model.training or with_labels)

    def _after_model(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        if self._share_logits and getattr(output, "logits", None) is not None:
            output.logits = self.group.broadcast(output.logits, 0, what="logits")
        self._share_logits, self._logits_kept = False, None
        if self._loss is not None:
            assert self._owned is not None
            output.loss = self._loss(output.logits, self._owned, self.group, self.grad_scale)
            self._loss = None
        return output

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        given = arguments_of(self.signature, args, kwargs)
        if self.model.training and torch.is_grad_enabled() and not self.method.trains:
            raise NotImplementedError(
                f"{type(self.method).__name__} does not train on several ranks: use tiled_attention, or model.eval()."
            )
        if self.decoder is self.model:
            self._trains = self._learns(False)
        tokens = given.pop("input_ids", None)
        embedded = given.pop("inputs_embeds", None)
        name, inputs = ("input_ids", tokens) if tokens is not None else ("inputs_embeds", embedded)
        if inputs is None:
            raise ValueError("the model was called without input_ids and inputs_embeds: pass one of them.")
        self._count = inputs.shape[1]
        wanted = given.pop("use_cache", None)
        self._use_cache = wanted is not False
        cache = self.cache = cache_for(given.pop(self.cache_keyword, None), self.group)
        first, mask, positions = cache.length, given.pop("attention_mask", None), given.pop("position_ids", None)
        real = real_tokens(mask, inputs, first)
        if positions is None:
            positions = torch.arange(first, first + self._count, device=inputs.device).unsqueeze(0)
        positions = positions.expand(len(inputs), -1)
        texts = self._apart = None
        if mask is None and first == 0:
            cached = getattr(self.decoder.config, "use_cache", False) if wanted is None else wanted
            texts = texts_of(positions, with_cache=cached)
            if texts is not None and not self.method.packs:
                self._apart, texts = Apart.of(texts), None
        rows = real if self._apart is None else self._apart.real
        if follows_length(self.model):  # ranks have different positions, and must use the same rotary frequencies
            self._rope = frozen_rope(self.model, int(positions.max()) + 1)
            self._rope.__enter__()
        if first == 0 or self._count > 1:
            given_here = {"first": first, name: digest(inputs), "mask": digest(real), "positions": digest(positions)}
            agree(self.group, given_here, what="inputs")
        if first == 0:
            same_random_state(self.group)
            layout = self.method.deal(rows.cpu(), self.group.rank, self.group.size)
        else:
            layout = self._turn(cache, *inputs.shape[:2])
        if self._trains and (layout is None or first):
            raise ValueError(
                f"{self._count} tokens after {first} are not cut into shards for {self.group.size} ranks, and only "
                "sharded prompts can be trained: pass at least one token per rank and worker, and no cache."
            )
        if layout is None and (texts is not None or self._apart is not None):
            raise NotImplementedError(f"packed texts of {self._count} tokens are too short to be cut into shards.")
        if self._trains:
            if is_offloaded(self.model):
                raise NotImplementedError(
                    "offloaded weights keep no gradients: train with the model on its device, or sharded by FSDP2."
                )
            if self.model.training:
                refuse_dropout(self.model)
            if self._loss is not None and not self.method.computes_padding:
                self._loss.check_padding(real)
        self.step = cache.begin(rows, layout, texts, None if self._apart is None else self._apart.rows)
        self.columns = self._packed(self.step.columns, self.step.columns)[1]
        if layout is not None:
            self.prefill_tokens = layout.columns.shape[1]
            part = take if self._apart is None else self._apart.take
            inputs, positions = part(inputs, layout.columns), part(positions, layout.columns)
        return (), {
            **given,
            name: inputs,
            "position_ids": positions,
            # Given neither a cache nor a mask, Transformers would take the positions of padding for packed texts.
            "attention_mask": torch.ones_like(self.step.columns) if self._trains else None,
            self.cache_keyword: None if self._trains else cache,
            "use_cache": not self._trains,
        }

    def _after(self, _: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        assert self.step is not None and self.cache is not None
        layout = self.step.layout
        if layout is not None and self._trains:
            hidden, own = output.last_hidden_state, layout.reported.to(self.step.columns.device)
            # Rows that another rank reports enter no loss here, and their exchanges run backward all the same.
            hidden = tie(hidden[:, own.to(hidden.device)], hidden)
            real = self.step.columns[:, own]
            columns = layout.columns.to(own.device)[:, own] if self._apart is None else real
            output.last_hidden_state, self._owned = self._packed(hidden, columns)
            self.columns = self._owned if self._apart is not None else real
        elif layout is not None:
            output.last_hidden_state = self._collect(output.last_hidden_state, layout)
        self.cache.finish(self._count)
        returned = self._use_cache and not self._trains and self._apart is None  # a cache of texts fits no later turn
        set_returned_cache(output, self.cache if returned else None)
        return output

    def _close(self, *_: Any) -> None:
        self.step = None
        if self._rope is not None:
            self._rope.__exit__(None, None, None)
            self._rope = None

    def _turn(self, cache: ShardedCache, batch: int, count: int) -> Layout | None:
        """The layout of a later turn that is dealt; None for one that every rank computes."""
        layout = None
        if self.min_turn is not None and batch * count >= self.min_turn:
            layout = turns.deal(batch, count, cache.loads, self.group.rank)
        self.dealt_turns += layout is not None
        self.repeated_turns += layout is None and count > 1
        return layout

    def _packed(self, hidden: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """`hidden` (N, T, ...) and `columns` (N, T) of texts that were taken apart, in their packed rows again."""
        if self._apart is None:
            return hidden, columns
        places = self._apart.together(columns)
        return at(hidden, places), torch.where(places < 0, -1, at(columns, places))

    def _collect(self, hidden: Tensor, layout: Layout) -> Tensor:
        """The hidden states (B, n, H) of the last n columns on every rank; n is `_logits_kept`, or all if None."""
        count = self._count
        first = count - (count if self._logits_kept is None else min(self._logits_kept, count))
        reported = layout.reported.to(hidden.device)
        hidden, columns = self._packed(hidden[:, reported], layout.columns.to(hidden.device)[:, reported])
        row, slot = (columns >= first).nonzero(as_tuple=True)
        collected = hidden.new_zeros(len(hidden), count - first, hidden.shape[2])
        collected[row, columns[row, slot] - first] = hidden[row, slot]
        return self.group.collect(collected, what="hidden states")
