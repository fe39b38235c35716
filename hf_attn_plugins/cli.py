"""`hf-attn`: one table of commands; each is a module with `add_arguments(parser)` and `run(arguments)`."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Mapping

from hf_attn_plugins.core import interrupt
from hf_attn_plugins.plugins import PLUGINS

Table = Mapping[str, "tuple[str, str] | Table"]

_BENCH = {
    "front": "accuracy against speed: star's plans, tuned ones, windows and exact attention",
    "gpu": "Triton kernels on a GPU: check the results, then measure speed",
    "indexed": "speed of indexed attention against the direct form; training on a real text",
    "memory": "peak memory of one attention call for several lengths",
    "parallel": "bytes, memory and work per rank of each method on several ranks",
    "triton": "registers and instructions of the compiled Triton kernels; needs no GPU",
}

HOW_TO_GO_ON = {
    "eval": "run the same command to continue, with the same --out",
    "patch": "nothing is half done; run the same command again",
}


def commands() -> Table:
    """Every command: name -> (module, what it does), or a table of sub-commands; methods' own come from their rows."""
    rows = sorted(PLUGINS.values(), key=lambda row: row.name)
    bench = {
        row.short: (row.bench, f"speed and memory of {row.name} against other backends") for row in rows if row.bench
    }
    bench |= {name: (f"hf_attn_plugins.commands.bench.{name}", what) for name, what in _BENCH.items()}
    return {
        "list": ("hf_attn_plugins.commands.list", "the table of attention plugins"),
        "check": ("hf_attn_plugins.commands.check", "what a plugin would do in every attention module of a model"),
        "compare": (
            "hf_attn_plugins.commands.compare",
            "agreement, speed and memory of a plugin against another backend",
        ),
        "tune": (
            "hf_attn_plugins.commands.tune",
            "sizes and dense heads of star_attention for a model, by speed, KL or share of the pairs",
        ),
        "plan": {
            row.short: (row.command, f"print the plan of {row.name} and its costs, or draw it")
            for row in rows
            if row.command
        }
        | {
            "parallel": (
                "hf_attn_plugins.commands.plan_parallel",
                "what each method moves and holds on several ranks, for a model, a length and a link",
            )
        },
        "bench": dict(sorted(bench.items())),
        "eval": (
            "hf_attn_plugins.eval.command",
            "long-context tasks, perplexity, agreement and speed against a baseline",
        ),
        "report": (
            "hf_attn_plugins.eval.report.command",
            "tables and page of an evaluation; several as one leaderboard",
        ),
        "patch": ("hf_attn_plugins.patches.command", "change a checkpoint by a recipe, show what was done, undo it"),
        "scan": ("hf_attn_plugins.commands.scan", "every family of Transformers, tiny, under every plugin, as a table"),
        "run": (
            "hf_attn_plugins.commands.run",
            "any Python command with the plugins registered: hf-attn run -- CMD ...",
        ),
    }


def main(argv: list[str] | None = None) -> int:
    """Run `hf-attn` with these arguments.

    Returns:
        the exit status: 0 done, 2 for bad input and 130 after Ctrl-C, each with one line on stderr.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    table, path = commands(), ["hf-attn"]
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
    program = " ".join(path)
    try:
        with interrupt.remembered():
            module = importlib.import_module(entry[0])
            parser = argparse.ArgumentParser(prog=program, description=entry[1])
            module.add_arguments(parser)
            arguments = parser.parse_args(words)  # exits with status 2 and one line of its own
            return module.run(arguments) or 0
    except KeyboardInterrupt:
        return _interrupted(program)
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        if interrupt.asked():  # an import that was interrupted may end in another error
            return _interrupted(program)
        text = " ".join(str(error).split())
        print(f"{program}: {text or type(error).__name__}", file=sys.stderr)
        return 2


def _interrupted(program: str) -> int:
    how = HOW_TO_GO_ON.get(program.split()[1], "run the same command again")
    print(f"{program}: interrupted: {how}.", file=sys.stderr)
    return 130


def _overview(path: list[str], table: Table) -> str:
    lines = [f"usage: {' '.join(path)} COMMAND ...", ""]
    for name, entry in table.items():
        what = entry[1] if isinstance(entry, tuple) else " | ".join(entry)
        lines.append(f"  {name:<9} {what}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
