"""`hf-attn bench cqs`: memory and time of one CQS worker and of undivided attention, measured in one run."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.bench.hardware import describe
from hf_attn_plugins.bench.peak_memory import PeakMemory
from hf_attn_plugins.bench.timing import write_table
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.cqs.planning.scheduler import plan
from hf_attn_plugins.cqs.planning.worker_share import Leaf
from hf_attn_plugins.cqs.tiler import Tiler
from hf_attn_plugins.cqs.tokens import Tokens
from hf_attn_plugins.cqs.workers import WorkerResult, work
from hf_attn_plugins.kernels.attend import attend

HEADS, KV_HEADS, HEAD_DIM = 2, 1, 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NAME, TITLE = "cqs", "CQS attention: one worker against the whole"
NOTES = f"""\
{HEADS}:{KV_HEADS} heads, head_dim {HEAD_DIM}. "Whole" is undivided attention over all N tokens.

* `L / N`: tokens of the longest worker, divided by N (computed).
* MiB: peak of one process above its start, inputs and results included, for the worker with the most work and for the
  whole. `scores` is textbook attention, which holds all scores; a worker holds those of one range of rows at a time.
  `linear` is `kernels.attend`.
* `longest / whole`: seconds of the slowest worker, divided by those of `attend` on the whole. `all + tiler / whole`:
  seconds of all workers one after another and of the merge, divided in the same way: the cost of the division on a
  single device. Both are medians of ratios; the whole is timed again in every round.
* `cells`: (query, key) pairs given to the kernel, divided by N^2; diagonal blocks of causal attention count in full.
  `dense cells`: the same for a kernel that masks banned blocks instead of skipping them, m^2 / W. `balance`: pairs of
  the largest worker, divided by the mean. All three are computed.

The paper (one A100, float16, textbook scores, all workers on one device) publishes peak memory of 0.563, 0.184, 0.251
and 0.038 of the whole for 4, 7, 8 and 31 workers. That is (L / N)^2: each of its workers holds all its scores, banned
ones included. `scores` above is smaller, because banned blocks are skipped and ranges of rows are computed one by one.
With a kernel of linear memory about L / N remains. So the division saves much less memory compared with a
FlashAttention-style kernel than compared with textbook attention. The paper timed without waiting for the device, so
its time ratios cannot be compared. A worker cannot take less than its share of the pairs, 1 / W."""


def run(arguments: argparse.Namespace) -> None:
    """Measure, print row by row, write the table.

    Raises:
        ValueError: a length, a number of workers or the repeats are below 1.
    """
    if min([*arguments.lengths, *arguments.workers, arguments.repeats]) < 1:
        raise ValueError("--lengths, --workers and --repeats must be at least 1.")
    rows = _kept(arguments.out)
    for dtype, length, mask in itertools.product(arguments.dtypes, arguments.lengths, arguments.masks):
        causal = mask == "causal"
        for row in measure(length, arguments.workers, causal, arguments.repeats, arguments.scores_up_to, dtype):
            print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
            rows[_case(row)] = row
            # Written after every row, so that an interrupted run keeps its measurements.
            path = write_table(arguments.out, NAME, TITLE, [rows[case] for case in sorted(rows)], NOTES)
    print("written to", path)


@torch.no_grad()
def measure(
    tokens: int, worker_counts: list[int], is_causal: bool, repeats: int, scores_up_to: int, dtype: str = "float32"
) -> Iterator[dict[str, Any]]:
    """One table row per number of workers."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, heads, tokens, HEAD_DIM, generator=generator).to(DTYPES[dtype])
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    leaves = {count: list(plan(tokens, count).leaves()) for count in worker_counts}
    attend(*inputs, is_causal=is_causal)  # warm-up
    measured = tokens <= scores_up_to
    whole_linear = _peak(lambda x: attend(x[0], x[1], x[2], is_causal=is_causal), inputs)
    whole_scores = _peak(lambda x: _textbook(x[0], x[1], x[2], is_causal), inputs) if measured else None
    for count, shares in leaves.items():
        most = max(shares, key=lambda leaf: leaf.cells(is_causal))
        material = _material(inputs, most)
        linear = _peak(partial(_work, most, is_causal), material)
        scores = _peak(partial(_textbook_worker, most, is_causal), material) if measured else None
        cells = [leaf.cells(is_causal) for leaf in shares]
        handed = sum(_size(p.rows) * sum(map(_size, p.keys)) for leaf in shares for p in leaf.pieces(is_causal))
        longest, together = _times(inputs, shares, is_causal, repeats)
        yield {
            "dtype": dtype,
            "tokens": tokens,
            "mask": "causal" if is_causal else "full",
            "workers": count,
            "L / N": max(leaf.length for leaf in shares) / tokens,
            **_memory("scores", scores, whole_scores),
            **_memory("linear", linear, whole_linear),
            "longest / whole": longest,
            "all + tiler / whole": together,
            "cells": handed / tokens**2,
            "dense cells": sum(leaf.length**2 for leaf in shares) / tokens**2,
            "balance": max(cells) / statistics.mean(cells),
        }


def _times(inputs: list[Tensor], leaves: list[Leaf], is_causal: bool, repeats: int) -> tuple[float, float]:
    """(slowest worker / whole, all workers and the Tiler / whole) in seconds, medians of the rounds' ratios.

    The whole is timed right before the workers of every round, so that a machine that slows down slows both.
    """
    single: list[list[float]] = []
    together: list[float] = []
    for _ in range(repeats):
        whole, _result = _timed(lambda: attend(inputs[0], inputs[1], inputs[2], is_causal=is_causal))
        tiler, each = Tiler(leaves, inputs[0], HEAD_DIM), []
        for leaf in leaves:
            seconds, result = _timed(partial(_work, leaf, is_causal, _material(inputs, leaf)))
            each.append(seconds / whole)
            tiler.add(result)
        merging, _result = _timed(tiler.result)
        single.append(each)
        together.append(sum(each) + merging / whole)
    return max(map(statistics.median, zip(*single, strict=True))), statistics.median(together)


def _work(leaf: Leaf, is_causal: bool, material: list[Tensor]) -> WorkerResult:
    query, key, value = (Tokens(x, leaf.ranges) for x in material)
    return work(leaf, query, key, value, mask=Mask(causal=is_causal))


def _material(inputs: list[Tensor], leaf: Leaf) -> list[Tensor]:
    return [Tokens(x).take(leaf.ranges).contiguous() for x in inputs]


def _textbook(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    scores = query @ key.repeat_interleave(HEADS // KV_HEADS, 1).mT
    scores *= HEAD_DIM**-0.5
    if is_causal:
        # Row by row, because the memory of a whole mask would be measured too.
        for row in range(scores.shape[-2]):
            scores[..., row, row + 1 + scores.shape[-1] - scores.shape[-2] :] = -torch.inf
    scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    scores.div_(scores.sum(-1, keepdim=True))
    return scores @ value.repeat_interleave(HEADS // KV_HEADS, 1)


def _textbook_worker(leaf: Leaf, is_causal: bool, material: list[Tensor]) -> list[Tensor]:
    query, key, value = (Tokens(x, leaf.ranges) for x in material)
    return [
        _textbook(query.take((piece.rows,)), key.take(piece.keys), value.take(piece.keys), piece.causal)
        for piece in leaf.pieces(is_causal)
    ]


def _peak(function: Callable[[list[Tensor]], Any], inputs: list[Tensor]) -> float | None:
    """Peak MiB of making the inputs and running the function on them; None if the system does not report it."""
    with PeakMemory(inputs[0].device) as memory:
        result = function([x.clone() for x in inputs])
    del result
    return None if memory.bytes is None else memory.bytes / 2**20


def _memory(name: str, worker: float | None, whole: float | None) -> dict[str, Any]:
    known = worker is not None and whole is not None
    return {
        f"{name} MiB": worker if known else "",
        f"{name} whole MiB": whole if known else "",
        f"{name} ratio": worker / whole if known else "",  # type: ignore[operator]
    }


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def _size(span: tuple[int, int]) -> int:
    return span[1] - span[0]


def _case(row: dict[str, Any]) -> tuple[Any, ...]:
    """The sort key of a row: float32 before bfloat16, full before causal."""
    return row["dtype"] != "float32", row["tokens"], row["mask"] == "causal", row["workers"]


def _kept(folder: Path) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows of an earlier run with the same hardware and versions, so that several runs can fill one table."""
    path = folder / f"{NAME}.json"
    if not path.is_file():
        return {}
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["hardware"] != describe():
        return {}
    return {_case(row): row for row in record["rows"]}
