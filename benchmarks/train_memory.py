"""Peak memory of one training step, per rank, of SmolLM2 with its text cut over ranks; one process for comparison.

python -m torch.distributed.run --standalone --nproc-per-node 4 benchmarks/train_memory.py --length 8192
python benchmarks/train_memory.py --length 8192

Weights and gradients exist before the measurement starts, so that the peak is that of activations, logits, received
keys and what the backend holds.
"""

from __future__ import annotations

import argparse
import json
import time

import torch

import hf_attn_plugins as hap
from hf_attn_plugins.bench.peak_memory import PeakMemory
from hf_attn_plugins.hf.inputs.load import load


def main() -> None:
    """Run one step and print one line of JSON per rank."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--layers", type=int, help="only the first layers of the model")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--attention", default="tiled_attention")
    parser.add_argument("--options", type=json.loads, default={}, help="of context_parallel, as JSON")
    parser.add_argument("--checkpointing", action="store_true")
    given = parser.parse_args()
    model, _ = load("smollm2-135m", dtype=given.dtype)
    if given.layers:
        model.model.layers = model.model.layers[: given.layers]
        model.config.num_hidden_layers = given.layers
    model.train()
    if given.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    tokens = torch.randint(0, 49152, (1, given.length), generator=torch.Generator().manual_seed(0))
    with hap.context_parallel(model, given.attention, timeout=3600, **given.options) as session:
        short = tokens[:, : 64 * session.size]
        model(input_ids=short, labels=short).loss.backward()  # loads code, makes the gradients
        began = time.monotonic()
        with PeakMemory(session.group.device) as memory:
            loss = model(input_ids=tokens, labels=tokens).loss
            loss.backward()
        seconds = time.monotonic() - began
        report = {
            "rank": session.rank, "ranks": session.size, "peak MiB": round((memory.bytes or 0) / 2**20),
            "loss": loss.item(), "seconds": round(seconds), **vars(given),
        }  # fmt: skip
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main()
