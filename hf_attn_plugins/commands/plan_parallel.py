"""`hf-attn plan parallel`: what each method moves and holds per rank for a model, a length and a link; on paper."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_attn_plugins.cqs.planning.cost import CallShape
from hf_attn_plugins.plugins import plugin, resolve
from hf_attn_plugins.star.command import read_config
from hf_attn_plugins.star.cost import ModelShape

if TYPE_CHECKING:  # they import torch, which --help does not need
    from hf_attn_plugins.parallel.forms import Form
    from hf_attn_plugins.parallel.method import Cost

COLUMNS = ("method", "exact", "GB moved", "all ranks GB", "link s", "GB held", "cache GB", "pairs", "rows", "decode KB")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--length", type=int, required=True, help="tokens of the prompt")
    parser.add_argument("--ranks", type=int, required=True, help="number of processes")
    parser.add_argument("--model", required=True, help="folder, config.json or hub id of a model")
    parser.add_argument("--link", type=float, default=25.0, help="GB/s that a rank sends, and receives, at once")
    parser.add_argument("--block-size", type=int, help="tokens of Star's blocks; default: by length")
    parser.add_argument("--halo-size", type=int, help="tokens just before a block that Star's blocks see as well")
    parser.add_argument("--workers", type=int, help="workers of CQS; default: chosen for the number of ranks")
    parser.add_argument("--turn", type=int, help="tokens of a later turn behind the prompt, counted as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures to a file as well")


def run(arguments: argparse.Namespace) -> None:
    """Print one row per method, which one moves least, and what the figures mean.

    Raises:
        ValueError: a length, number of ranks, turn or link below 1 or 0, or a config without sizes.
        OSError: no such model, or a file that cannot be written.
    """
    if arguments.length < 1 or arguments.ranks < 1 or not arguments.link > 0:
        raise ValueError(
            f"--length {arguments.length} --ranks {arguments.ranks} --link {arguments.link}: a length and ranks of at "
            "least 1 and a positive link are needed."
        )
    if arguments.turn is not None and arguments.turn < 1:
        raise ValueError(f"--turn {arguments.turn}: a later turn of at least 1 token is needed.")
    from hf_attn_plugins.parallel.forms import FORMS

    model = ModelShape.of(read_config(arguments.model))
    rows = [row(form, arguments, model) for form in FORMS]
    later = [turn_row(is_dealt, arguments, model) for is_dealt in (False, True)] if arguments.turn else []
    print(_table(rows + later))
    found = [each for each in rows if "why not" not in each]
    for label, group in (("exact method", [each for each in found if each["exact"]]), ("method", found)):
        if group:
            best = min(group, key=lambda each: each["GB moved"])
            print(f"least moved by the busiest rank, any {label}: {best['method']}, {best['GB moved']:.4g} GB")
    if later:
        print(turn_note(arguments, model))
    weights = model.linear_flops(1) // 2 * model.bytes_per_value
    print(notes(arguments, weights))
    if arguments.json:
        arguments.json.write_text(json.dumps(rows + later, indent=1) + "\n", encoding="utf-8")


def row(form: Form, arguments: argparse.Namespace, model: ModelShape) -> dict[str, Any]:
    """The figures of one form over all layers; or `why not`, where the prompt cannot be cut that way."""
    head: dict[str, Any] = {"method": form.label, "exact": form.exact}
    try:
        per_rank = _costs(form, arguments, _shape(model))
    except ValueError as error:
        return {**head, "why not": str(error)}
    causal = arguments.length * (arguments.length + 1) // 2
    return {**head, **_figures(per_rank, model.layers, arguments.link, causal, arguments.length)}


def turn_row(is_dealt: bool, arguments: argparse.Namespace, model: ModelShape) -> dict[str, Any]:
    """The same figures of a later turn behind the prompt, whose keys lie evenly on the ranks."""
    from hf_attn_plugins.parallel import turns
    from hf_attn_plugins.parallel.partition import contiguous

    head = {"method": f"later turn, {'dealt' if is_dealt else 'by every rank'}", "exact": True}
    loads = [len(run) for run in contiguous(arguments.length, arguments.ranks)]
    try:
        per_rank = turns.costs(arguments.turn, loads, _shape(model), is_dealt=is_dealt)
    except ValueError as error:
        return {**head, "why not": str(error)}
    pairs = arguments.turn * arguments.length + arguments.turn * (arguments.turn + 1) // 2
    return {**head, **_figures(per_rank, model.layers, arguments.link, pairs, arguments.turn)}


def _shape(model: ModelShape) -> CallShape:
    return CallShape(model.heads, model.kv_heads, model.head_dim, model.head_dim, model.bytes_per_value)


def _figures(per_rank: list[Cost], layers: int, link: float, pairs: int, rows: int) -> dict[str, Any]:
    moved = max(max(cost.sent, cost.received) for cost in per_rank) * layers
    return {
        "GB moved": moved / 1e9,
        "all ranks GB": sum(cost.sent for cost in per_rank) * layers / 1e9,
        "link s": moved / 1e9 / link,
        "GB held": max(cost.held for cost in per_rank) / 1e9,
        "cache GB": max(cost.cache for cost in per_rank) * layers / 1e9,
        "pairs": max(cost.pairs for cost in per_rank) / pairs,
        "rows": max(cost.rows for cost in per_rank) / rows,
        "decode KB": per_rank[0].decode * layers / 1e3,
    }


def _costs(form: Form, arguments: argparse.Namespace, shape: CallShape) -> list[Cost]:
    from hf_attn_plugins.parallel.costs import costs
    from hf_attn_plugins.parallel.forms import ring

    if form.name is None:
        return ring(arguments.length, arguments.ranks, shape)
    given = {"block_size": arguments.block_size, "halo_size": arguments.halo_size, "workers": arguments.workers}
    if form.options.get("preset"):
        given["halo_size"] = None
    names = resolve(plugin(form.name).ranks).names()
    options = {name: value for name, value in given.items() if name in names and value is not None}
    return costs(form.name, arguments.length, arguments.ranks, shape, **form.options, **options)


def turn_note(arguments: argparse.Namespace, model: ModelShape) -> str:
    """From how many tokens on a session deals a later turn, over this link."""
    from hf_attn_plugins.parallel.link import Wire, least_turn

    wire = Wire(Wire.of("cuda", 1).flops, arguments.link * 1e9, Wire.of("cuda", 1).latency)
    least = least_turn(model, arguments.ranks, wire)
    if least is None:
        return "One rank: a later turn is never dealt."
    return (
        f"A later turn takes less time dealt from {least} tokens on, of all batch rows, at {wire.flops:g} FLOP/s,\n"
        f"{arguments.link:g} GB/s and {wire.latency * 1e6:g} microseconds per exchange. Its pairs and rows are shares "
        f"of one process's, for {arguments.turn:,}\ntokens behind {arguments.length:,}."
    )


def notes(arguments: argparse.Namespace, weights: int) -> str:
    """What the columns mean."""
    return f"""\
One prompt of {arguments.length:,} tokens on {arguments.ranks} ranks, forward; every layer counted as full attention.
GB moved: all layers, bytes that the busiest rank sends or receives, whichever are more. link s: these bytes at
{arguments.link:g} GB/s, nothing overlapped, latency left out. GB held: queries, keys, values and results of one layer
on a rank, received ones included. cache GB: keys and values of all layers that a rank keeps. pairs: of dense causal
attention in one process, on the busiest rank. rows: tokens through projections and MLP, of the prompt's. decode KB:
bytes received per generated token. Each rank also holds the weights: {weights / 1e9:.4g} GB, embeddings, head and
inactive experts left out. Figures are counted from the plans that run, except for the formula of ring attention."""


def _table(rows: list[dict[str, Any]]) -> str:
    cells = [[str(name) for name in COLUMNS]]
    for each in rows:
        if "why not" in each:
            cells.append([each["method"], "yes" if each["exact"] else "no", each["why not"]])
            continue
        shown = [f"{each[name]:.4g}" for name in COLUMNS[2:]]
        cells.append([each["method"], "yes" if each["exact"] else "no", *shown])
    full = [line for line in cells if len(line) == len(COLUMNS)]
    widths = [max(len(line[i]) for line in full) for i in range(len(COLUMNS))]
    widths[0] = max(len(line[0]) for line in cells)
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        )
        for line in cells
    )
