"""Phase 1, explicit: stock forwards of the model that fill the buffers of a star cache, in order.

Block 1 is run alone. Its first keys and values are the anchor; every later block is run at its true positions over a
cache that holds the anchor and the block's halo, and only the block's own keys and values are kept (paper, algorithm 1,
the anchor reused). Without a halo later blocks do not depend on each other, so several can be rows of one batch. Under
a halo they do: several blocks in a row are then one forward over anchor and halo, with the plan as a mask.

Dense heads need every key before a block, so such a run is one forward over all that is encoded, without a mask: which
head sees which key is `star.context_rows`' work.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hf_attn_plugins.hf.compat import cache_keyword
from hf_attn_plugins.star.hf.cache import Layers, Record, cache_of
from hf_attn_plugins.star.hf.model import block_masks, decoder, takes_mask_tensors

RUN_TOKENS = 1024  # under a halo, blocks smaller than this are encoded in runs: few forwards, and matrices large enough
MOST_PAIRS = 1 << 24  # pairs of row and key that the mask of a run may have: 16 MiB of bool


class Encoder:
    """Buffers of the final cache and how far they are filled.

    Attributes:
        layers: (key, value) of each layer, (B, Hkv, L, D) and (B, Hkv, L, Dv); empty before the first step.
        done: tokens whose keys and values are there.
    """

    def __init__(self, model: nn.Module, record: Record, done: Layers | None) -> None:
        self.model, self.plan, self.ids = decoder(model), record.plan, record.context_ids
        self.heads_differ = record.heads_differ
        self.whole_model = model
        self.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
        self.layers: Layers = []
        self.done = 0
        if done:
            self.done = done[0][0].shape[2]
            self.layers = [(self._buffer(key), self._buffer(value)) for key, value in done]
            self._write(done, 0)

    def step(self, batch_blocks: int) -> None:
        """Encode what is missing of the current block, and as many later blocks as go into the same forward."""
        first = self.done
        if self.plan.halo_size or self.heads_differ:
            count, end = 1, self._end_of_run(batch_blocks)
        else:
            count, end = self._batch(batch_blocks)
        parts = self._forward(first, end, count)
        if not self.layers:
            self.layers = [(self._buffer(key), self._buffer(value)) for key, value in parts]
        self._write(parts, first)
        self.done = end

    def _batch(self, batch_blocks: int) -> tuple[int, int]:
        """Without a halo: how many blocks are rows of one batch, and where the last one ends."""
        plan, first = self.plan, self.done
        block = first // plan.block_size * plan.block_size
        whole = (plan.length - first) // plan.block_size
        if first == block and first and whole:
            return min(batch_blocks, whole), first + min(batch_blocks, whole) * plan.block_size
        return 1, min(block + plan.block_size, plan.length)

    def _end_of_run(self, batch_blocks: int) -> int:
        """Where blocks depend on each other: where a run of blocks ends that is one forward."""
        plan, size = self.plan, self.plan.block_size
        block = self.done // size * size
        end = block + max(batch_blocks, RUN_TOKENS // size) * size
        if end > plan.dense_end and not self.heads_differ:
            # These rows need a mask, of rows * (reach + rows) pairs at most.
            reach = min(plan.anchor_size + plan.halo_size, plan.length)
            rows = (math.isqrt(reach**2 + 4 * MOST_PAIRS) - reach) // 2 if takes_mask_tensors(self.whole_model) else 0
            end = min(end, max(plan.dense_end, block + size, block + rows // size * size))
        return min(end, plan.length)

    def _forward(self, first: int, end: int, count: int) -> Layers:
        batch, rows = len(self.ids), (end - first) // count
        ids = self.ids[:, first:end].reshape(batch * count, rows).to(self.device)
        own = torch.arange(first, end, device=self.device).view(1, count, rows).expand(batch, -1, -1).flatten(0, 1)
        runs = self._past_runs(first)
        past = torch.cat([torch.arange(run.start, run.stop, device=self.device) for run in runs])
        cache = cache_of([(self._past(k, runs, count), self._past(v, runs, count)) for k, v in self.layers])
        several_blocks = count == 1 and end > self.plan.block(first // self.plan.block_size).stop
        plan = self.plan if several_blocks and end > self.plan.dense_end else None
        masks = None
        if not self.heads_differ:
            masks = block_masks(self.whole_model, past, own[:1] if count == 1 else own, plan)
        self.model(
            input_ids=ids,
            position_ids=own,
            attention_mask=masks,
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

    def _past_runs(self, first: int) -> list[range]:
        """Positions before `first` that its block sees, anchor and near tokens: one run where they meet."""
        anchor, near = self.plan.anchor, self.plan.near(first // self.plan.block_size)
        if near.start <= anchor.stop or self.heads_differ:
            return [range(first)]
        return [anchor, range(near.start, first)] if near.start < first else [anchor]

    @staticmethod
    def _past(stored: Tensor, runs: list[range], count: int) -> Tensor:
        """Keys or values at the places of `runs` (one run is a view), once for each of `count` blocks."""
        pieces = [stored[:, :, run.start : run.stop] for run in runs]
        taken = pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)
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
