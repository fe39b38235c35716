"""Phase 1, explicit: a context encoded block by block into an ordinary cache, to ask many questions over it.

`encoder.Encoder` runs the model; this file holds the verbs around it: `encode`, `append`, `plan_of`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.hf.configure import use
from hf_attn_plugins.hf.models.evaluating import evaluating
from hf_attn_plugins.hf.models.unwrap import language_model
from hf_attn_plugins.star.context_rows import in_context
from hf_attn_plugins.star.hf.cache import Layers, Record, as_ids, cache_of, layers_of, record_of
from hf_attn_plugins.star.hf.encoder import Encoder
from hf_attn_plugins.star.hf.fingerprint import fingerprint
from hf_attn_plugins.star.hf.model import check_model, dense, follows_length, frozen_rope, stored_heads
from hf_attn_plugins.star.options import heads_of
from hf_attn_plugins.star.plan import Plan, plan_for

Progress = bool | Callable[[int, int], None]


def encode(
    model: nn.Module,
    context_ids: Tensor | Sequence[int] | Sequence[Sequence[int]],
    *,
    block_size: int | None = None,
    anchor_size: int | None = None,
    halo_size: int | None = None,
    dense_heads: Sequence[Sequence[int]] | None = None,
    batch_blocks: int = 1,
    max_length: int | None = None,
    progress: Progress = False,
    resume: str | Path | None = None,
) -> Any:
    """Encode a context once, to ask many questions over it.

    Args:
        model: a decoder of Transformers with any attention implementation.
        context_ids: (L,) or (B, L) token ids, unpadded, with the beginning-of-sequence token if the model wants one.
        block_size, anchor_size, halo_size: tokens, as in `Plan`. None: block and anchor by L, and no halo (`plan_for`);
            the sizes in the model's config belong to the stateless form and are not read.
        dense_heads: for every layer the key heads that see everything before them, as in `StarOptions`; [] for none.
            None: those in the model's config, where `hap.tune` leaves them. The model then runs with the kernels of
            star_attention, whatever its own implementation, over everything encoded so far.
        batch_blocks: blocks encoded in one forward; activations grow with it. Blocks with a halo depend on each other
            and are encoded in order: a forward takes a run of this many blocks or of `encoder.RUN_TOKENS` tokens, what
            is longer, and fewer where the run's mask would have more than `encoder.MOST_PAIRS` pairs.
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
        ValueError: sizes or heads out of range, a resume folder that holds something else, or dense heads in a model
            that star_attention cannot run in.
    """
    model, ids = language_model(model), as_ids(context_ids, "context_ids")
    sizes = plan_for(ids.shape[1], block_size, anchor_size, 0, halo_size)
    longest = max(ids.shape[1], max_length or 0) if follows_length(model) else 0
    heads = stored_heads(model) if dense_heads is None else heads_of(dense_heads)
    record = Record(ids, sizes.block_size, sizes.anchor_size, longest, fingerprint(model), sizes.halo_size, heads)
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
    record = dataclasses.replace(old, context_ids=ids)
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
    encoder = Encoder(model, record, done)
    with (
        _reporter(progress, record.length) as report,
        _attention(model, record),
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


@contextlib.contextmanager
def _attention(model: Any, record: Record) -> Iterator[None]:
    """The model with what encodes `record`: its own attention cut into blocks, or star's where heads differ."""
    if not record.heads_differ:
        with dense(model):
            yield
        return
    with use(model, "star_attention", **record.options), in_context():
        yield


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
