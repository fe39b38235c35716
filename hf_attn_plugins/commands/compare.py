"""`hf-attn compare MODEL`: the same real tokens through a plugin and through another backend."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from hf_attn_plugins.bench.hardware import describe
from hf_attn_plugins.hf.compare import Agreement, Run, compare
from hf_attn_plugins.hf.inputs.load import add_model_arguments, load_for, options_from, positions
from hf_attn_plugins.hf.inputs.texts import text_tokens
from hf_attn_plugins.plugins import PLUGINS, plugin


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_model_arguments(parser)
    parser.add_argument("--attn", default="tiled_attention", help="the plugin (see hf-attn list)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="an option of the plugin")
    parser.add_argument(
        "--baseline",
        default=None,
        help="the backend to compare with; the model's own default (sdpa or eager) if not given",
    )
    parser.add_argument("--length", type=int, default=4096, help="tokens of the text")
    parser.add_argument("--text", metavar="FILE", help="UTF-8 text; Python's own language reference by default")
    parser.add_argument(
        "--max-positions", type=int, metavar="N", help="the longest text that the model can take, against its config"
    )
    parser.add_argument("--repeats", type=int, default=3, help="timed prefills of each backend, interleaved")
    parser.add_argument("--json", metavar="FILE", help="write everything to FILE as well ('-' prints it instead)")


def run(arguments: argparse.Namespace) -> None:
    """Load, compare, print."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    options = options_from(arguments.option)
    target = arguments.json
    if target not in (None, "-") and not Path(target).resolve().parent.is_dir():
        raise ValueError(f"--json {target}: the folder {Path(target).resolve().parent} does not exist.")
    plugin(arguments.attn)  # an unknown name is refused before a model is loaded
    model, tokenizer = load_for(arguments)
    limit = arguments.max_positions or positions(model.config)
    ids = text_tokens(tokenizer, arguments.length, arguments.text, limit).to(model.device)
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("starting", total=None)
        report = compare(
            model,
            ids,
            arguments.attn,
            baseline=arguments.baseline,
            repeats=arguments.repeats,
            progress=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
            **options,
        )
    record = {"model": arguments.model, "dtype": arguments.dtype, **describe(model.device), **report.as_dict()}
    if target == "-":
        print(json.dumps(record, indent=2))
        return
    show(report, f"{arguments.model}, {ids.shape[1]} tokens of {arguments.text or 'the Python language reference'}")
    if target is not None:
        Path(target).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        print(f"written to {target}")


def show(report: Agreement, title: str) -> None:
    """Print an `Agreement` as two small tables and a sentence."""
    from rich.console import Console
    from rich.table import Table

    console, base, ours = Console(), report.baseline, report.plugin
    cost = Table("", base.name, _with_options(ours), "ratio", title=title)
    cost.add_row("prefill, median", f"{base.seconds:.3g} s", f"{ours.seconds:.3g} s", speed_in_words(report))
    if len(base.repeats) > 1:
        cost.add_row(f"min - max of {len(base.repeats)}", _range(base), _range(ours), "")
    cost.add_row("tokens per second", f"{base.tokens_per_second:.0f}", f"{ours.tokens_per_second:.0f}", "")
    if base.peak_bytes is not None and ours.peak_bytes is not None:
        ratio = f"{ours.peak_bytes / max(1, base.peak_bytes):.2f}x"
        cost.add_row("peak memory, weights aside", _mib(base.peak_bytes), _mib(ours.peak_bytes), ratio)
    cost.add_row("perplexity", f"{base.perplexity:.4f}", f"{ours.perplexity:.4f}", f"{report.perplexity_ratio:.5f}")
    console.print(cost)
    if ours.plan is not None:
        console.print(f"what ran: {ours.plan}")
        if not PLUGINS[ours.name].exact and ours.plan.startswith("dense"):
            console.print(f"{ours.name} ran dense: nothing approximate was tested. Give more tokens or a block_size.")
    same = Table("next-token predictions", "difference")
    same.add_row("same first choice", f"{100 * report.top1:.2f} % of {report.tokens} positions")
    usual = f"mean {report.kl_mean:.2e}, median {report.kl_median:.2e}"
    same.add_row("KL divergence (nats)", f"{usual}, 99.9 % {report.kl_p999:.2e}, max {report.kl_max:.2e}")
    probabilities = f"max {report.max_probability_difference:.2e}, RMS {report.rms_probability_difference:.2e}"
    same.add_row("probabilities", probabilities)
    console.print(same)
    console.print(describe_line(), style="dim")


def speed_in_words(report: Agreement) -> str:
    """Who is faster and by how much, or that the repeats do not tell."""
    times = max(report.speedup, 1 / report.speedup)
    said = f"{times:.2f}x {'faster' if report.speedup >= 1 else 'slower'}"
    if min(len(report.baseline.repeats), len(report.plugin.repeats)) < 2:
        return f"{said}, one prefill each: spread unknown"
    return "within noise" if report.within_noise else said


def _range(run: Run) -> str:
    return f"{min(run.repeats):.3g} - {max(run.repeats):.3g} s"


def describe_line() -> str:
    """Hardware and versions on one line."""
    facts: dict[str, Any] = describe()
    machine = f"{facts['processor']}, {facts['threads']} threads"
    return f"{machine}, torch {facts['torch']}, transformers {facts['transformers']}"


def _with_options(run: Run) -> str:
    return run.name + "".join(f" {k}={v}" for k, v in run.options.items())


def _mib(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"
