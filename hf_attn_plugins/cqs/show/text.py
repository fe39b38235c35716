"""A plan and its demonstration as text, in the order and the words of the paper's notebook."""

from __future__ import annotations

from collections.abc import Iterator

import hf_attn_plugins.cqs.planning.cost as cost
from hf_attn_plugins.cqs.planning.scheduler import Plan
from hf_attn_plugins.cqs.planning.worker_share import Leaf
from hf_attn_plugins.cqs.show.demo import Demonstration, memory_summary


def scheduler(plan: Plan, head_dim: int) -> Iterator[str]:
    """The Scheduler's lists."""
    workers = range(plan.num_workers)
    yield "==== Scheduler ====="
    yield f"N = {plan.num_tokens}, W = {plan.num_workers}, d = {head_dim}"
    for title, content in (
        ("Interest Set", list(plan.interest_set)),
        ("TG-Tk map", {group: list(tokens) for group, tokens in enumerate(plan.token_groups)}),
        ("CQS", plan.quorums),
        ("undistilled pair list", plan.undistilled_pairs),
        ("distilled pair list", plan.distilled_pairs),
        ("distilled CQS", plan.distilled_quorums),
        ("MtrlL", plan.material),
        ("Task lists (ONLY for validation purpose)", [plan.tasks(w) for w in workers]),
        ("Ban lists (global index)", [plan.bans(w) for w in workers]),
        ("Ban lists (reindexed)", [plan.local_bans(w) for w in workers]),
    ):
        yield title
        yield str(content)


def workers_and_tiler(demo: Demonstration) -> Iterator[str]:
    """What every worker computes, and the Tiler's sums and result."""
    yield "===== Workers ====="
    for index, local in enumerate(demo.workers):
        length, head_dim = local.outputs.shape
        yield f"Worker {index}: mTki = {length}, d = {head_dim}"
        yield f"Pi: {local.scores.shape}\n{local.scores}"
        yield f"Si.T: {local.sums.shape}\n{local.sums}"
        yield f"Oi: {local.outputs.shape}\n{local.outputs}"
    yield "===== Tiler ====="
    yield f"Putting local Oi and Si together:\n{demo.outputs}\nS.T\n{demo.sums}"
    yield f"Final Attention O = O/S\n{demo.attention}"


def summary(plan: Plan) -> Iterator[str]:
    """Tokens per worker, and how evenly the work is spread."""
    s = memory_summary(plan)
    yield f"Approximate ratio of subsequence length to N, m / W: {s['expected_ratio']}"
    yield f"Longest subsequence: {s['longest']}, ratio to N: {s['longest_ratio']}"
    yield f"Shortest subsequence: {s['shortest']}, ratio to N: {s['shortest_ratio']}"
    yield f"Average length: {s['average']}, ratio to N: {s['average_ratio']}"
    yield f"Standard deviation: {s['standard_deviation']}"
    yield (
        f"Largest worker's work over the mean: {plan.balance():.4f} (all pairs), "
        f"{plan.balance(is_causal=True):.4f} (causal)"
    )


def costs(plan: Plan, shape: cost.CallShape, is_causal: bool, budget: int | None, workspace: int) -> Iterator[str]:
    """Cells computed, bytes moved and held, and the same for the alternatives."""
    numbers = cost_numbers(plan, shape, is_causal, budget, workspace)
    counts = " x ".join(str(level.num_workers) for level in plan.levels)
    yield f"==== Cost of {plan.num_tokens} tokens with {counts} workers, {'causal' if is_causal else 'all pairs'} ===="
    yield (
        f"Executed cells: {numbers['cells']:,}, {numbers['cells_ratio']:.4f} of N^2 "
        f"(a dense kernel per worker: {numbers['dense_cells_ratio']:.4f})"
    )
    yield "One worker after another on one device:"
    yield f"  bytes moved {cost.format_bytes(numbers['moved'])}, peak {cost.format_bytes(numbers['peak'])}"
    if budget is not None:
        fits = "within" if numbers["peak"] <= budget else "ABOVE"
        yield f"  {fits} the budget of {cost.format_bytes(budget)}"
        tiles = numbers["tiles_moved"]
        if tiles is None:
            yield "  streaming key tiles past resident rows: not even one row fits this budget"
        else:
            better = "fewer: prefer it on one device" if tiles < numbers["moved"] else "more"
            yield f"  streaming key tiles past resident rows would move {cost.format_bytes(tiles)}, {better}"
    yield f"Spread over {plan.num_workers} devices, per device (bytes moved, bytes held):"
    for name, (moved, held) in numbers["devices"].items():
        limit = f"  (at most {shape.kv_heads} devices: one per key head)" if name == "Ulysses" else ""
        yield f"  {name:<10} {cost.format_bytes(moved):>12} {cost.format_bytes(held):>12}{limit}"


def cost_numbers(plan: Plan, shape: cost.CallShape, is_causal: bool, budget: int | None, workspace: int) -> dict:
    """The numbers of `costs` as a dictionary, for JSON: cells, bytes, and ratios to N^2."""
    total = max(1, plan.num_tokens) ** 2
    cells = sum(leaf.cells(is_causal) for leaf in plan.leaves())
    return {
        "cells": cells,
        "cells_ratio": cells / total,
        "dense_cells_ratio": sum(_dense_cells(leaf, is_causal) for leaf in plan.leaves()) / total,
        "moved": cost.streaming_bytes(plan, shape),
        "peak": cost.streaming_peak(plan, shape, workspace),
        "budget": budget,
        "tiles_moved": None
        if budget is None
        else cost.tile_streaming_bytes(plan.num_tokens, shape, budget, workspace, is_causal),
        "devices": cost.across_devices(plan, shape),
    }


def _dense_cells(leaf: Leaf, is_causal: bool) -> int:
    return leaf.length * (leaf.length + 1) // 2 if is_causal else leaf.length**2
