"""One rank of a real prompt: it reads the prompt, generates, and writes what it measured to a file.

python -m torch.distributed.run --standalone --nproc-per-node 2 \\
    -m hf_attn_plugins.commands.bench.parallel.prompt_rank CASE.json
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from hf_attn_plugins.bench.peak_memory import PeakMemory
from hf_attn_plugins.hf.inputs.load import load
from hf_attn_plugins.hf.inputs.texts import text_tokens
from hf_attn_plugins.parallel.comm.exchanges import Exchanges
from hf_attn_plugins.parallel.hf.context_parallel import context_parallel

OVERLAPPED, IN_TURN = "overlapped", "in turn"


def main(path: Path) -> None:
    """Run the case in the file; write `rank-N.json` beside it: a report for each way of sending."""
    torch.set_num_threads(1)
    case = json.loads(path.read_text(encoding="utf-8"))
    model, tokenizer = load(case["model"], case["dtype"], "cpu")
    ids = text_tokens(tokenizer, case["length"])
    ways = [OVERLAPPED]
    if int(os.environ["WORLD_SIZE"]) > 1 and case["name"] != "star_attention":  # star computes nothing while it sends
        ways = sorted([OVERLAPPED, IN_TURN], key=lambda way: way != case["first"])
    report = {way: generated(model, ids, case, way) for way in ways}
    path.with_name(f"rank-{os.environ['RANK']}.json").write_text(json.dumps(report), encoding="utf-8")


def generated(model: Any, ids: Tensor, case: dict[str, Any], way: str) -> dict[str, Any]:
    """Tokens, seconds until the first of them, seconds waited for other ranks, and bytes."""
    with context_parallel(model, case["name"], timeout=300) as cp, torch.no_grad():
        model(ids[:, : 64 * cp.size], logits_to_keep=1)  # loads code
        cp.traffic().reset()
        waits = Waits()
        clock = Clock(waits)
        with waits.counted(in_turn=way == IN_TURN), PeakMemory(torch.device("cpu")) as memory:
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=case["new"], min_new_tokens=case["new"],
                do_sample=False, streamer=clock,
            )  # fmt: skip
        return {
            **clock.first_token(),
            "tokens": made[0, ids.shape[1] :].tolist(),
            "peak": memory.bytes,
            "cache": cp.cache_bytes,
            "received": cp.traffic().received,
        }


class Clock(BaseStreamer):
    """Notes the time at which `generate` has the prompt, and each token."""

    def __init__(self, waits: Waits) -> None:
        self._waits = waits
        self._seen: list[tuple[float, float, float]] = []

    def put(self, value: Tensor) -> None:
        """`generate` gives the prompt, then each token."""
        self._seen.append((time.perf_counter(), time.process_time(), self._waits.seconds))

    def end(self) -> None:
        """`generate` has ended."""

    def first_token(self) -> dict[str, float]:
        """Seconds from the prompt to the first token: of the wall clock, of this process's CPU time, and waited."""
        names = ("prefill_s", "cpu_s", "waits_s")
        return {name: late - early for name, early, late in zip(names, *self._seen[:2], strict=True)}


class Waits:
    """Counts the seconds in which this rank waits for exchanges.

    Attributes:
        seconds: so far.
    """

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def counted(self, in_turn: bool) -> Iterator[None]:
        """Count inside the block; with `in_turn` every exchange ends before anything else is computed."""
        start = Exchanges._start

        def timed(group: Exchanges, *arguments: Any) -> Callable[[], None]:
            wait = start(group, *arguments)

            def finish() -> None:
                began = time.perf_counter()
                wait()
                self.seconds += time.perf_counter() - began

            if in_turn:
                finish()
                return lambda: None
            return finish

        Exchanges._start = timed  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Exchanges._start = start  # type: ignore[method-assign]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
