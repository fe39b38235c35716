"""`hf-attn bench gpu`, the last part: one rank of a launch over all GPUs, which compares and times `context_parallel`.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m hf_attn_plugins.commands.bench.gpu.rank [CASE.json]
"""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hf_attn_plugins.bench.timing import synchronize
from hf_attn_plugins.commands.bench.gpu.command import rank_case
from hf_attn_plugins.commands.bench.parallel.rank import tiny_model
from hf_attn_plugins.hf.configure import use
from hf_attn_plugins.parallel.hf.context_parallel import context_parallel

ROUNDS = 5


def main(path: Path | None = None) -> None:
    """Run every method of the case; rank 0 writes `out.json` beside the file, one entry per method.

    Without a file the case is that of `hf-attn bench gpu`, and rank 0 prints.
    """
    case = rank_case("cuda") if path is None else json.loads(path.read_text(encoding="utf-8"))
    found = {name: run(case, name, options) for name, options in case["methods"].items()}
    if next(iter(found.values()))["rank"] == 0:
        if path is None:
            print(json.dumps(found, indent=1))
        else:
            path.with_name("out.json").write_text(json.dumps(found), encoding="utf-8")


def run(case: dict[str, Any], name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a prefill over all ranks and on one device; the largest differences of logits and gradients."""
    tokens = torch.randint(0, 256, (1, case["length"]), generator=torch.Generator().manual_seed(0))
    device = device_of(case)
    model = tiny_model(case).to(device)
    tokens = tokens.to(device)

    def prefill() -> torch.Tensor:
        with torch.no_grad():
            return model(tokens, logits_to_keep=1).logits

    def gradient(session: Any = None) -> torch.Tensor:
        """All gradients of the loss in a row, float32."""
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        if session is not None:
            session.sum_gradients()
        return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.grad is not None])

    one = contextlib.nullcontext() if case["alone"][name] != name else use(model, name, **options)
    if case["alone"][name] != name:
        model.set_attn_implementation(case["alone"][name])
    with one:
        alone, alone_ms = timed(prefill, device)
        wanted = gradient()
    with context_parallel(model, name, timeout=120, **options) as cp:
        together, ms = timed(prefill, device)
        found = gradient(cp)
        backend, rank, size = str(torch.distributed.get_backend()), cp.rank, cp.size
    return {
        "rank": rank, "ranks": size, "backend": backend, "ms": ms, "one_device_ms": alone_ms,
        "difference": float((together.float() - alone.float()).abs().max()),
        "largest_logit": float(alone.float().abs().max()),
        "gradient_difference": float((found - wanted).abs().max()),
        "largest_gradient": float(wanted.abs().max()),
    }  # fmt: skip


def timed(call: Any, device: torch.device) -> tuple[Any, float]:
    """The result and the median milliseconds of a call."""
    result, seconds = call(), []
    for _ in range(ROUNDS):
        synchronize(device)
        begin = time.perf_counter()
        result = call()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
    return result, 1e3 * statistics.median(seconds)


def device_of(case: dict[str, Any]) -> torch.device:
    """This rank's device: its own GPU, or the CPU in a rehearsal."""
    if case["device"] == "cpu":
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", torch.cuda.current_device())


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
