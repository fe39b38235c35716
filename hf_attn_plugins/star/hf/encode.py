"""Phase 1, explicit: a context encoded block by block into an ordinary cache, by stock forwards of the model.

Block 1 is run alone. Its first keys and values are the anchor; every later block is run at its true positions over a
cache that holds the anchor, and only the block's own keys and values are kept (paper, algorithm 1, the anchor reused).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.hf.compat import cache_keyword
from hf_attn_plugins.hf.models.evaluating import evaluating
from hf_attn_plugins.hf.models.unwrap import language_model
from hf_attn_plugins.star.hf.cache import Layers, Record, as_ids, cache_of, layers_of, record_of
from hf_attn_plugins.star.hf.fingerprint import fingerprint
from hf_attn_plugins.star.hf.model import (
    block_masks,
    check_model,
    decoder,
    dense,
    follows_length,
    frozen_rope,
)
from hf_attn_plugins.star.plan import Plan, plan_for

Progress = bool | Callable[[int, int], None]


def encode(
    model: nn.Module,
    context_ids: Tensor | Sequence[int] | Sequence[Sequence[int]],
    *,
    block_size: int | None = None,
    anchor_size: int | None = None,
    batch_blocks: int = 1,
    max_length: int | None = None,
    progress: Progress = False,
    resume: str | Path | None = None,
) -> Any:
    """Encode a context once, to ask many questions over it.

    Args:
        model: a decoder of Transformers with any attention implementation.
        context_ids: (L,) or (B, L) token ids, unpadded, with the beginning-of-sequence token if the model wants one.
        block_size, anchor_size: as in `Plan`; None chooses by L.
        batch_blocks: blocks encoded in one forward; activations grow with it.
        max_length: the longest position to come, question and answer included; only models whose rotary frequencies
            follow the length (`dynamic`, `longrope`) need it, and `ask` holds them there. Default: L.
        progress: True for a bar, or a function that gets (tokens done, tokens in all).
        resume: a folder to write finished blocks to, and to go on from if it holds some of this context already; it can
            be loaded by `load` afterwards.

    Returns:
        A `StarCache`, a `DynamicCache` of exactly L tokens, for `ask`, `append`, `branch` and `save`, and for
        `model.generate(input_ids=context and question, past_key_values=cache)`
        (`cache=cache` from Transformers 5.24 on).

    Raises:
        NotImplementedError: the model's context is not made of causal keys and values (`model.check_model`).
        ValueError: sizes out of range, or a resume folder that holds something else.
    """
    model, ids = language_model(model), as_ids(context_ids, "context_ids")
    sizes = plan_for(ids.shape[1], block_size, anchor_size, 0)
    longest = max(ids.shape[1], max_length or 0) if follows_length(model) else 0
    record = Record(ids, sizes.block_size, sizes.anchor_size, longest, fingerprint(model))
    return _continue(model, record, None, batch_blocks, progress, resume)


def append(
    model: nn.Module,
    cache: Any,
    more_ids: Tensor | Sequence[int] | Sequence[Sequence[int]],
    *,
    batch_blocks: int = 1,
    progress: Progress = False,
) -> Any:
    """The cache of a longer context: only the new tokens are encoded, those that fill up a ragged block included.

    Args:
        cache: a star cache; questions and answers that it has grown by are left out, and it stays as it is.
        more_ids: (T,) or (B, T) token ids that follow the context.

    Raises:
        ValueError: the cache was made by another model, or the batch sizes differ.
    """
    old, model = record_of(cache), language_model(model)
    if fingerprint(model) != old.model:
        raise ValueError("this cache was encoded by another model: append with the model it came from.")
    ids = torch.cat([old.context_ids, as_ids(more_ids, "more_ids")], 1)
    record = Record(ids, old.block_size, old.anchor_size, old.max_length, old.model)
    if follows_length(model) and record.length > old.max_length:
        raise ValueError(
            f"this model's rotary frequencies follow the length, the cache was encoded for {old.max_length} positions: "
            f"encode again with max_length={record.length} or more."
        )
    return _continue(model, record, layers_of(cache, old.length), batch_blocks, progress, None)


def _continue(
    model: nn.Module,
    record: Record,
    done: Layers | None,
    batch_blocks: int,
    progress: Progress,
    folder: str | Path | None,
) -> Any:
    check_model(model)
    if batch_blocks < 1:
        raise ValueError(f"batch_blocks={batch_blocks}: at least 1 block is encoded at a time.")
    store = None
    if folder is not None:
        from hf_attn_plugins.star.hf.store import Store

        store = Store(folder)
        done = store.begin(record)
    encoder = _Encoder(model, record, done)
    with (
        _reporter(progress, record.length) as report,
        dense(model),
        frozen_rope(model, record.max_length),
        torch.no_grad(),
        evaluating(model),
    ):
        report(encoder.done, record.length)
        while encoder.done < record.length:
            first = encoder.done
            encoder.step(batch_blocks)
            if store is not None:
                store.add(encoder.layers, first, encoder.done)
            report(encoder.done, record.length)
    if store is not None:
        store.finish()
    return cache_of(encoder.layers, record)


class _Encoder:
    """Buffers of the final cache and how far they are filled."""

    def __init__(self, model: nn.Module, record: Record, done: Layers | None) -> None:
        self.model, self.plan, self.ids = decoder(model), record.plan, record.context_ids
        self.whole_model = model
        self.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        self.layers: Layers = []
        self.done = 0
        if done:
            self.done = done[0][0].shape[2]
            self.layers = [(self._buffer(key), self._buffer(value)) for key, value in done]
            self._write(done, 0)

    def step(self, batch_blocks: int) -> None:
        """Encode what is missing of the current block, or the next whole blocks together."""
        plan, first = self.plan, self.done
        block = first // plan.block_size * plan.block_size
        whole = (plan.length - first) // plan.block_size
        if first == block and first and whole:
            count, end = min(batch_blocks, whole), first + min(batch_blocks, whole) * plan.block_size
        else:
            count, end = 1, min(block + plan.block_size, plan.length)
        # The past of these tokens: the anchor, and what is there of their block; in block 1 these are one run.
        past = [*range(block and len(plan.anchor)), *range(block, first)]
        parts = self._forward(first, end, count, past)
        if not self.layers:
            self.layers = [(self._buffer(key), self._buffer(value)) for key, value in parts]
        self._write(parts, first)
        self.done = end

    def _forward(self, first: int, end: int, count: int, past: list[int]) -> Layers:
        batch, rows = len(self.ids), (end - first) // count
        ids = self.ids[:, first:end].reshape(batch * count, rows).to(self.device)
        own = torch.arange(first, end, device=self.device).view(1, count, rows).expand(batch, -1, -1).flatten(0, 1)
        cache = cache_of([(self._past(k, past, count), self._past(v, past, count)) for k, v in self.layers])
        self.model(
            input_ids=ids,
            position_ids=own,
            attention_mask=block_masks(self.whole_model, torch.tensor(past, device=self.device), own),
            use_cache=True,
            **{cache_keyword(self.model): cache},
        )
        parts = []
        for index, layer in enumerate(cache.layers):
            if not isinstance(getattr(layer, "keys", None), Tensor) or layer.keys.shape[2] != len(past) + rows:
                raise NotImplementedError(
                    f"layer {index} of {type(self.model).__name__} keeps no keys of its own to put together."
                )
            parts.append(
                (self._row(layer.keys[:, :, len(past) :], count), self._row(layer.values[:, :, len(past) :], count))
            )
        return parts

    def _past(self, stored: Tensor, past: list[int], count: int) -> Tensor:
        """Keys or values at the places `past` (at most two runs, one is a view), once for each of `count` blocks."""
        anchor = len(self.plan.anchor)
        if past == list(range(len(past))):
            taken = stored[:, :, : len(past)]
        else:
            split = anchor if past[0] == 0 and anchor else 0
            taken = torch.cat([stored[:, :, :split], stored[:, :, past[split] : past[-1] + 1]], 2)
        if count == 1:
            return taken
        return taken.expand(count, -1, -1, -1) if len(taken) == 1 else taken.repeat_interleave(count, 0)

    @staticmethod
    def _row(part: Tensor, count: int) -> Tensor:
        """(batch * count, H, b, D) as (batch, H, count * b, D)."""
        return part.unflatten(0, (-1, count)).transpose(1, 2).flatten(2, 3)

    def _buffer(self, like: Tensor) -> Tensor:
        return like.new_empty(*like.shape[:2], self.plan.length, like.shape[3])

    def _write(self, parts: Layers, first: int) -> None:
        for (key, value), (new_key, new_value) in zip(self.layers, parts, strict=True):
            end = first + new_key.shape[2]
            key[:, :, first:end], value[:, :, first:end] = new_key, new_value


@contextlib.contextmanager
def _reporter(progress: Progress, total: int) -> Iterator[Callable[[int, int], None]]:
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield lambda done, total: None
        return
    from rich.progress import Progress as Bar

    with Bar() as bar:
        task = bar.add_task("encoding", total=total)
        yield lambda done, total: bar.update(task, completed=done)


def plan_of(cache: Any) -> Plan:
    """The plan that a star cache was encoded by."""
    return record_of(cache).plan
