"""`hf-attn`: one table of commands; each is a module with `add_arguments(parser)` and `run(arguments)`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping

Table = Mapping[str, "tuple[str, str] | Table"]

COMMANDS: Table = {
    "list": ("hf_attn_plugins.commands.listing", "the attention plugins, as a table"),
    "check": ("hf_attn_plugins.commands.check", "what a plugin would do in every attention module of a model"),
    "compare": ("hf_attn_plugins.commands.compare", "agreement, speed and memory of a plugin against another backend"),
    "plan": {
        "cqs": ("hf_attn_plugins.cqs.command", "Scheduler, Workers and Tiler; bytes, peaks and balance of a plan"),
        "star": ("hf_attn_plugins.star.command", "a prompt in blocks, anchor and query: cells, FLOPs, bytes"),
        "tiled": ("hf_attn_plugins.tiled.command", "FlashAttention's tiles, step by step, drawn or animated"),
    },
    "bench": {
        "cqs": ("hf_attn_plugins.cqs.bench", "one worker's time and memory, executed cells and balance, over W and N"),
        "gpu": ("hf_attn_plugins.commands.bench_gpu", "the Triton kernels on a GPU: correctness, then speed"),
        "indexed": ("hf_attn_plugins.indexed.command", "indexed attention against the direct form, and on a real text"),
        "memory": ("hf_attn_plugins.commands.bench_memory", "peak memory of one call over the length"),
        "parallel": ("hf_attn_plugins.commands.bench_parallel", "several ranks: bytes, memory and work of each method"),
        "star": ("hf_attn_plugins.commands.bench_star", "what Star's sizes cost in agreement and save in time"),
        "tiled": ("hf_attn_plugins.commands.bench_tiled", "the tiles against PyTorch's attention, call by call"),
        "triton": ("hf_attn_plugins.kernels.triton_bench", "--static: the kernels as compiled, without a GPU"),
    },
    "eval": ("hf_attn_plugins.eval.command", "long-context tasks, perplexity, agreement and speed against a baseline"),
    "report": ("hf_attn_plugins.eval.report.command", "tables and page of an evaluation; several as one leaderboard"),
    "patch": ("hf_attn_plugins.patches.command", "change a checkpoint by a recipe, show what was done, undo it"),
    "scan": ("hf_attn_plugins.commands.scan", "every family of Transformers, tiny, under every plugin, as a table"),
    "run": ("hf_attn_plugins.commands.run", "any Python command with the plugins registered: hf-attn run -- CMD ..."),
}


def main(argv: list[str] | None = None) -> int:
    """Run `hf-attn` with these arguments; returns the exit status: 0 done, 2 for bad input, with one line on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    table, path = COMMANDS, ["hf-attn"]
    while True:
        if not words or words[0] in ("-h", "--help"):
            print(_overview(path, table))
            return 0 if words else 2
        word = words.pop(0)
        path.append(word)
        if word not in table:
            print(f"{' '.join(path[:-1])}: no command {word!r}: choose one of {', '.join(table)}.", file=sys.stderr)
            return 2
        entry = table[word]
        if isinstance(entry, tuple):
            return _run(entry, path, words)
        table = entry


def _run(entry: tuple[str, str], path: list[str], words: list[str]) -> int:
    module = importlib.import_module(entry[0])
    parser = argparse.ArgumentParser(prog=" ".join(path), description=entry[1])
    module.add_arguments(parser)
    arguments = parser.parse_args(words)  # exits with status 2 and one line of its own
    try:
        return module.run(arguments) or 0
    except KeyboardInterrupt:
        return 130
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        text = " ".join(str(error).split())
        print(f"{parser.prog}: {text or type(error).__name__}", file=sys.stderr)
        return 2


def _overview(path: list[str], table: Table) -> str:
    lines = [f"usage: {' '.join(path)} COMMAND ...", ""]
    for name, entry in table.items():
        what = entry[1] if isinstance(entry, tuple) else " | ".join(entry)
        lines.append(f"  {name:<9} {what}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
