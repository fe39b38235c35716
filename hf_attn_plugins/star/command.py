"""`hf-attn plan star`: a plan in words, in cells and, for a model, in FLOPs and bytes."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hf_attn_plugins.plugins import resolve
from hf_attn_plugins.star.cost import ModelShape, cost, warnings
from hf_attn_plugins.star.draw import picture, text
from hf_attn_plugins.star.plan import PAPER, plan_for

TEXT_CELLS = 64  # a plan of at most so many tokens is also shown in characters
SHOWN_BLOCKS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--length", type=int, required=True, help="tokens of the prompt, context and query together")
    parser.add_argument("--block-size", type=int, help="tokens of a block (default: by length)")
    parser.add_argument("--anchor-size", type=int, help="leading tokens every block attends to (default: by block)")
    parser.add_argument("--halo-size", type=int, help="tokens just before a block that it attends to as well")
    parser.add_argument("--preset", choices=[PAPER], help="sizes by length without near tokens, as in the paper")
    parser.add_argument("--query-size", type=int, help="last tokens of the prompt, which attend to everything")
    parser.add_argument("--model", help="folder, config.json or hub id of a model: adds FLOPs, bytes and expected gain")
    parser.add_argument("--draw", metavar="FILE", help="write the attended cells as an image")


def run(arguments: argparse.Namespace) -> None:
    config = read_config(arguments.model) if arguments.model else None  # before anything is printed
    sizes = (arguments.block_size, arguments.anchor_size, arguments.query_size, arguments.halo_size, arguments.preset)
    plan = plan_for(arguments.length, *sizes)
    parts = {"halo": plan.halo_size, "anchor": len(plan.anchor), "query": len(plan.query)}
    words = ", ".join(f"{name} {size}" for name, size in parts.items() if size or name != "halo")
    print(f"context {plan.context} tokens in {plan.num_blocks} blocks of {plan.block_size}, {words}")
    shown = [(f"block {i}", plan.block(i)) for i in range(min(plan.num_blocks, SHOWN_BLOCKS))]
    for name, tokens in [*shown, ("query", plan.query)]:
        if tokens:
            print(f"  {name:<9}{tokens.start:>9} .. {tokens.stop - 1}")
        if name == f"block {SHOWN_BLOCKS - 1}" and plan.num_blocks > SHOWN_BLOCKS:
            print(f"  ... {plan.num_blocks - SHOWN_BLOCKS} more blocks")
    pairs, causal = plan.attended_pairs(), plan.causal_pairs()
    print(f"attended pairs {pairs:,} of {causal:,} causal ones ({pairs / max(1, causal):.1%})")
    gain = None
    if config is not None:
        shape = ModelShape.of(config)
        price = cost(plan, shape)
        gain = price.gain
        print(f"prefill FLOPs, head left out: star {price.star:.3e}, dense {price.dense:.3e}")
        print(f"  with the anchor recomputed for every block, as published: {price.recomputed:.3e}")
        print(f"bytes of cache: {price.cache_bytes:,} (as many as dense attention keeps)")
        print(f"expected gain of the prefill: {gain:.2f}x where time follows FLOPs")
    for warning in warnings(plan, gain):
        print(f"warning: {warning}")
    if 0 < plan.length <= TEXT_CELLS:
        print(text(plan))
    if arguments.draw:
        picture(plan, arguments.draw)
        print(f"drawn: {arguments.draw}")


def read_config(model: str) -> dict[str, Any]:
    """The contents of a model's config.json: of a file, or of a model named as in every other command.

    Raises:
        FileNotFoundError: a folder without config.json.
        ValueError: no such folder, or the hub gives no config.
    """
    path = Path(model)
    if path.is_dir():
        path = path / "config.json"
        if not path.exists():
            raise FileNotFoundError(f"--model {model}: there is no {path}.")
    if path.is_file():
        return json.loads(path.read_text(encoding="utf-8"))
    # By name, as the plugin table names things: this folder knows no Transformers.
    config_of = resolve("hf_attn_plugins.hf.inputs.load:config_of")
    return config_of(model)
