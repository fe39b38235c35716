"""The commands of `hf-attn`: one table; each names a module with `run(arguments)` and where its options stand."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from hf_attn_plugins.plugins import PLUGINS, resolve
from hf_attn_plugins.ui.parser import Parser


class Entry(NamedTuple):
    """One command.

    Attributes:
        module: with `run(arguments)`, and `add_arguments(parser)` unless `arguments` names it elsewhere.
        what: one line on what it does.
        arguments: "module:function" that declares the options without importing torch; for modules that import it.
        go_on: what to do after Ctrl-C.
    """

    module: str
    what: str
    arguments: str = ""
    go_on: str = "run the same command again"

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's options."""
        if self.arguments:
            resolve(self.arguments)(parser)
        else:
            importlib.import_module(self.module).add_arguments(parser)

    def parser(self, program: str) -> Parser:
        """The command's parser."""
        parser = Parser(prog=program, description=self.what)
        self.add_arguments(parser)
        return parser

    def run(self, arguments: argparse.Namespace) -> Any:
        """Do it; the exit status, where None is 0."""
        return importlib.import_module(self.module).run(arguments)


Table = Mapping[str, "Entry | Table"]
BENCH = "hf_attn_plugins.commands.bench"
SAME_OUT = "run the same command to continue, with the same --out"

_BENCH = {
    "decode": ("decode", "speed of one layer's step of decoding, tiled_attention against sdpa"),
    "front": ("front.command", "accuracy against speed: star's plans, tuned ones, windows and exact attention"),
    "gpu": ("gpu.command", "Triton kernels on a GPU: check the results, then measure speed"),
    "indexed": ("indexed.command", "speed of indexed attention against the direct form; training on a real text"),
    "memory": ("memory", "peak memory of one attention call for several lengths"),
    "parallel": (
        "parallel.command",
        "each method on several ranks: bytes, memory, work; a real prompt; training memory",
    ),
    "triton": ("triton", "registers and instructions of the compiled Triton kernels; needs no GPU"),
}


def commands() -> Table:
    """Every command: name -> `Entry`, or a table of sub-commands; methods' own come from their rows."""
    rows = sorted(PLUGINS.values(), key=lambda row: row.name)
    bench = {
        row.short: _bench(row.short, f"speed and memory of {row.name} against other backends", row.bench)
        for row in rows
        if row.bench
    }
    bench |= {name: _bench(name, what, f"{BENCH}.{module}") for name, (module, what) in _BENCH.items()}
    return {
        "list": Entry("hf_attn_plugins.commands.list", "the table of attention plugins"),
        "check": Entry("hf_attn_plugins.commands.check", "what a plugin would do in every attention module of a model"),
        "compare": Entry(
            "hf_attn_plugins.commands.compare", "agreement, speed and memory of plugins against another backend"
        ),
        "look": Entry(
            "hf_attn_plugins.commands.look",
            "how far a model's heads look in a text, and where its predictions change, as a page",
        ),
        "tune": Entry(
            "hf_attn_plugins.commands.tune",
            "sizes and dense heads of star_attention for a model, by speed, KL or share of the pairs",
        ),
        "plan": {
            row.short: Entry(row.command, f"print the plan of {row.name} and its costs, or draw it")
            for row in rows
            if row.command
        }
        | {
            "parallel": Entry(
                "hf_attn_plugins.commands.plan_parallel",
                "what each method moves and holds on several ranks, for a model, a length and a link",
            )
        },
        "bench": dict(sorted(bench.items())),
        "eval": Entry(
            "hf_attn_plugins.eval.command",
            "long-context tasks, perplexity, agreement and speed against a baseline",
            "hf_attn_plugins.eval.arguments:add_arguments",
            SAME_OUT,
        ),
        "report": Entry(
            "hf_attn_plugins.eval.report.command",
            "tables and page of an evaluation; several as one leaderboard",
            "hf_attn_plugins.eval.arguments:add_report_arguments",
        ),
        "patch": Entry(
            "hf_attn_plugins.patches.command",
            "change a checkpoint by a recipe, show what was done, undo it",
            go_on="nothing is half done; run the same command again",
        ),
        "export-kernel": Entry(
            "hf_attn_plugins.commands.export_kernel",
            "the exact kernels as a repository for the `kernels` package, to name as OWNER/NAME",
        ),
        "scan": Entry(
            "hf_attn_plugins.commands.scan",
            "every family of Transformers, tiny, under every plugin, as a table",
            go_on="run the same command to continue, with the same --json",
        ),
        "run": Entry(
            "hf_attn_plugins.commands.run", "any Python command with the plugins registered: hf-attn run -- CMD ..."
        ),
        "activate": Entry(
            "hf_attn_plugins.commands.activate",
            "register the plugins in every program of this Python environment, without an import",
        ),
        "deactivate": Entry(
            "hf_attn_plugins.commands.deactivate", "take back what activate has put into this Python environment"
        ),
        "completion": Entry(
            "hf_attn_plugins.commands.completion", "print the completion of a shell: hf-attn completion bash|zsh|fish"
        ),
    }


def _bench(name: str, what: str, module: str) -> Entry:
    own = module.startswith(f"{BENCH}.")  # a plugin of the user's declares its options in its own module
    arguments = f"{BENCH}.arguments:{name}" if own else ""
    return Entry(
        module, what, arguments, SAME_OUT if name in ("front", "parallel", "star") else Entry._field_defaults["go_on"]
    )
