"""One rank of a training step, which writes its peak memory to a file.

python -m torch.distributed.run --standalone --nproc-per-node 4 \\
    -m hf_attn_plugins.commands.bench.parallel.training_rank CASE.json

Weights and gradients exist before the measurement starts, so that the peak is that of activations, logits, received
keys and what the backend holds.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from hf_attn_plugins.bench.peak_memory import PeakMemory
from hf_attn_plugins.hf.inputs.load import load
from hf_attn_plugins.parallel.hf.context_parallel import context_parallel


def main(path: Path) -> None:
    """Run the case in the file; write `rank-N.json` beside it."""
    torch.set_num_threads(1)
    case = json.loads(path.read_text(encoding="utf-8"))
    report = step(case)
    path.with_name(f"rank-{os.environ['RANK']}.json").write_text(json.dumps(report), encoding="utf-8")


def step(case: dict[str, Any]) -> dict[str, Any]:
    """Peak bytes, loss and layers of one forward and backward pass."""
    model, _ = load(case["model"], case["dtype"], "cpu")
    model.train()
    if case["checkpointing"]:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, model.config.vocab_size, (1, case["length"]), generator=generator)
    with context_parallel(model, case["name"], timeout=3600) as session:
        short = tokens[:, : 64 * session.size]
        model(input_ids=short, labels=short).loss.backward()  # loads code, makes the gradients
        with PeakMemory(session.group.device) as memory:
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
    return {"peak": memory.bytes, "loss": loss.item(), "layers": model.config.num_hidden_layers}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
