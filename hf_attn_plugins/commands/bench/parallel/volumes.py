"""Bytes, memory and work per rank of each method: counted from the plans, and measured on a random Llama."""

from __future__ import annotations

import argparse
from typing import Any

from hf_attn_plugins.bench.ranks import reports_of
from hf_attn_plugins.cqs.planning.cost import CallShape
from hf_attn_plugins.parallel.costs import Cost, costs
from hf_attn_plugins.parallel.forms import Form, ring

SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def check(arguments: argparse.Namespace) -> None:
    """Refuse sizes below 1 and heads that do not divide.

    Raises:
        ValueError: one of them, or options that do not fit the length or the ranks.
    """
    for name in ("length", "heads", "kv_heads", "head_dim", "layers", "ranks"):
        given = getattr(arguments, name)
        if (min(given) if isinstance(given, list) else given) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {given}: at least 1 is needed.")
    if any(arguments.heads % kv_heads for kv_heads in arguments.kv_heads):
        raise ValueError(f"--heads {arguments.heads} is no multiple of each of --kv-heads {arguments.kv_heads}.")
    for ranks in arguments.ranks:
        for kv_heads in arguments.kv_heads:
            for form in forms(arguments):
                plan_costs(arguments, form, ranks, kv_heads)


def rows_of(arguments: argparse.Namespace, ranks: int) -> list[dict[str, Any]]:
    """The rows for one number of ranks.

    Raises:
        OSError: the ranks cannot be launched, or one of them failed; the message has its first error.
    """
    cases = [(kv_heads, form) for kv_heads in arguments.kv_heads for form in forms(arguments)]
    counts = [counted(arguments, form, ranks, kv_heads) for kv_heads, form in cases]
    reports = measured(arguments, cases, ranks) if ranks <= arguments.measure_up_to else [None] * len(cases)
    for (kv_heads, form), row, report in zip(cases, counts, reports, strict=True):
        row |= _comparison(plan_costs(arguments, form, ranks, kv_heads), report, arguments.layers)
        print("  ".join(f"{k} {_cell(v)}" for k, v in row.items()), flush=True)
    return counts


def forms(arguments: argparse.Namespace) -> list[Form]:
    """The rows for one number of ranks and heads, with the options of the command line that each method has."""
    block = arguments.block_size or max(1, arguments.length // 8)
    star = {"block_size": block, "anchor": "recompute"}
    cqs = {"workers": arguments.workers, "rounds": arguments.rounds}
    return [
        Form("tiled", "tiled_attention", True, {"exchange": "gather"}),
        Form("tiled, heads", "tiled_attention", True, {"exchange": "heads"}),
        Form("ring", None, True),
        Form("star", "star_attention", False, star),
        Form("star, near", "star_attention", False, {**star, "halo_size": arguments.halo_size or block}),
        Form("cqs", "cqs_attention", True, cqs),
    ]


def plan_costs(arguments: argparse.Namespace, form: Form, ranks: int, kv_heads: int) -> list[Cost]:
    """The cost of one layer, for each rank."""
    size = SIZES[arguments.dtype]
    shape = CallShape(arguments.heads, kv_heads, arguments.head_dim, arguments.head_dim, size)
    if form.name is None:
        return ring(arguments.length, ranks, shape)
    return costs(form.name, arguments.length, ranks, shape, **form.options)


def counted(arguments: argparse.Namespace, form: Form, ranks: int, kv_heads: int) -> dict[str, Any]:
    """The figures of a row, counted from the plan; each is the largest of all ranks."""
    per_rank = plan_costs(arguments, form, ranks, kv_heads)
    most = {field: max(getattr(cost, field) for cost in per_rank) for field in vars(per_rank[0])}
    dense = arguments.length * (arguments.length + 1) // 2
    return {
        "method": form.label,
        "heads": f"{arguments.heads}:{kv_heads}",
        "ranks": ranks,
        "received KiB": most["received"] // 2**10,
        "sent KiB": most["sent"] // 2**10,
        "all ranks KiB": sum(cost.sent for cost in per_rank) // 2**10,
        "held KiB": most["held"] // 2**10,
        "cache KiB": most["cache"] // 2**10,
        "decode B": most["decode"],
        "pairs": most["pairs"] / dense,
        "rows": most["rows"] / arguments.length,
    }


def _comparison(planned: list[Cost], reports: list[dict[str, Any]] | None, layers: int) -> dict[str, Any]:
    """The measured columns: whether the measured figures equal the counted ones, and peak memory."""
    if reports is None:
        return {"as counted": "", "peak MiB": ""}
    # One rank runs the plugin itself, which makes no exchange and follows another plan than the counted one.
    wrong = differences(planned, reports, layers) if len(reports) > 1 else []
    peaks = [report["peak"] for report in reports]
    return {
        "as counted": "; ".join(wrong) or ("yes" if len(reports) > 1 else ""),
        "peak MiB": "" if None in peaks else max(peaks) / 2**20,
    }


def measured(
    arguments: argparse.Namespace, cases: list[tuple[int, Form]], ranks: int
) -> list[list[dict[str, Any]] | None]:
    """The reports of all ranks of one launch, for each case (key heads, form); None for a formula."""
    sizes = {field: getattr(arguments, field) for field in ("length", "heads", "head_dim", "layers", "dtype")}
    requests = [{**sizes, "kv_heads": n, "name": form.name, "options": form.options} for n, form in cases if form.name]
    module = "hf_attn_plugins.commands.bench.parallel.rank"
    files = reports_of(module, requests, ranks, arguments.timeout)
    reports = iter([list(each) for each in zip(*files, strict=True)])
    return [next(reports) if form.name else None for _, form in cases]


def differences(costs: list[Cost], reports: list[dict[str, Any]], layers: int) -> list[str]:
    """The figures of each rank that differ from the counted ones times the layers, as text."""
    wrong = []
    for rank, (cost, report) in enumerate(zip(costs, reports, strict=True)):
        for field in ("sent", "received", "cache", "decode", "pairs", "rows"):
            expected = getattr(cost, field) * (1 if field == "rows" else layers)
            if report[field] != expected:
                wrong.append(f"rank {rank}: {field} {report[field]} instead of {expected}")
    return wrong


def notes(arguments: argparse.Namespace) -> str:
    """The meaning of the columns, printed below the table."""
    cases = ", ".join(f"{form.label} {form.options}" for form in forms(arguments) if form.options)
    return f"""\
One prompt of {arguments.length} tokens, head_dim {arguments.head_dim}, {arguments.dtype}; {cases}. `heads` are those of
queries and of keys.
All figures are for one layer and counted from the plans; each is the largest over the ranks. `received`, `sent`: bytes
from and to other ranks in a prefill, forward; `all ranks`: bytes that all ranks together send. `held`: queries, keys,
values and results on a rank at once, received ones included. `cache`: keys and values that stay. `decode`: bytes
received per generated token. `pairs`: (query, key) pairs computed over those of dense causal attention in one process.
`rows`: tokens through projections and MLP over the prompt's. `tiled, heads` is Ulysses; `ring` is a formula, not run.
`as counted`: whether processes on gloo (random Llama, {arguments.layers} layers, hidden size \
{arguments.heads * arguments.head_dim}) sent and received exactly these bytes, kept exactly this cache, computed exactly
these pairs (as the kernels' masks show them) and rows, on every rank. `peak MiB`: measured, the largest peak of a rank
above its start during the whole prefill, model apart, hidden states, MLP and what the backend holds included."""


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
