"""`hf-attn bench gpu`, the last part: one rank of a launch over all GPUs, which compares and times `context_parallel`.

python -m torch.distributed.run --standalone --nproc-per-node 2 -m hf_attn_plugins.commands.bench.gpu.rank CASE.json
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from hf_attn_plugins.bench.timing import synchronize
from hf_attn_plugins.commands.bench.parallel.rank import tiny_model
from hf_attn_plugins.parallel.hf.context_parallel import context_parallel

ROUNDS = 5


def main(path: Path) -> None:
    """Run every method of the case; rank 0 writes `out.json` beside the file, one entry per method."""
    case = json.loads(path.read_text(encoding="utf-8"))
    found = {name: run(case, name, options) for name, options in case["methods"].items()}
    if next(iter(found.values()))["rank"] == 0:
        path.with_name("out.json").write_text(json.dumps(found), encoding="utf-8")


def run(case: dict[str, Any], name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of a prefill over all ranks and on one device, and the largest difference of the last logits."""
    tokens = torch.randint(0, 256, (1, case["length"]), generator=torch.Generator().manual_seed(0))
    device = device_of(case)
    model = tiny_model(case).to(device)
    tokens = tokens.to(device)
    with torch.no_grad():
        model.set_attn_implementation(case["alone"].get(name, "sdpa"))
        alone, alone_ms = timed(lambda: model(tokens, logits_to_keep=1).logits, device)
        with context_parallel(model, name, timeout=120, **options) as cp:
            together, ms = timed(lambda: model(tokens, logits_to_keep=1).logits, device)
            backend, rank, size = str(torch.distributed.get_backend()), cp.rank, cp.size
    return {
        "rank": rank, "ranks": size, "backend": backend, "ms": ms, "one_device_ms": alone_ms,
        "difference": float((together.float() - alone.float()).abs().max()),
        "largest_logit": float(alone.float().abs().max()),
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
    main(Path(sys.argv[1]))
