"""Pictures of a plan: who computes which part of the N x N matrix, and how long the workers' subsequences are."""

from __future__ import annotations

import os
from typing import Any

from hf_attn_plugins.cqs.planning.scheduler import Plan

NUMBERED = 20  # workers at most that are drawn in colours of their own, with their numbers


def partition(plan: Plan) -> list[list[int]]:
    """W x W table: the worker that computes the block of groups (row, column)."""
    owner = [[-1] * plan.num_workers for _ in range(plan.num_workers)]
    for worker, pairs in enumerate(plan.distilled_pairs):
        owner[worker][worker] = worker
        for a, b in pairs:
            owner[a][b] = owner[b][a] = worker
    return owner


def draw(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Write both pictures side by side to the image file `path`. Blocks are drawn, not tokens, so any N works.

    Raises:
        ModuleNotFoundError: matplotlib is not installed; the message names the extra that brings it.
    """
    figure_class = _figure()
    figure = figure_class(figsize=(13, 6), layout="constrained")
    matrix, lengths = figure.subplots(1, 2)
    groups = [group for group in plan.token_groups if len(group)]
    edges = [group.start for group in groups] + [plan.num_tokens]
    used = [index for index, group in enumerate(plan.token_groups) if len(group)]
    owner = partition(plan)
    if used:
        blocks = [[owner[a][b] for b in used] for a in used]
        few = plan.num_workers <= NUMBERED
        # Workers are names, not amounts: few of them get unlike colours and their number, many a scale.
        colours = {"cmap": "tab20", "vmax": 19} if few else {"cmap": "turbo", "vmax": plan.num_workers - 1}
        mesh = matrix.pcolormesh(edges, edges, blocks, vmin=0, edgecolors="white" if few else "none", **colours)
        if few:
            centres = [(group.start + group.stop) / 2 for group in groups]
            for y, row in zip(centres, blocks, strict=True):
                for x, worker in zip(centres, row, strict=True):
                    matrix.text(x, y, str(worker), ha="center", va="center")
        else:
            figure.colorbar(mesh, ax=matrix, label="worker")
    matrix.invert_yaxis()
    matrix.set(aspect="equal", xlabel="key position", ylabel="query position")
    matrix.set_title(
        f"Who computes which pairs: {plan.num_tokens} tokens, {plan.num_workers} workers, "
        f"interest set {list(plan.interest_set)[:8]}"
    )
    lengths.bar(range(plan.num_workers), plan.lengths, color="tab:blue")
    if plan.num_workers <= NUMBERED:
        lengths.set_xticks(range(plan.num_workers))
    lengths.axhline(plan.num_tokens, color="tab:red", label="whole sequence")
    lengths.set(xlabel="worker", ylabel="tokens", title="Tokens that each worker reads")
    lengths.set_ylim(0, 1.15 * max(1, plan.num_tokens))
    lengths.legend(loc="upper right")
    figure.savefig(path, dpi=100)


def _figure() -> Any:
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "drawing needs matplotlib: install it with `pip install hf-attn-plugins[demo]`, or leave --draw out."
        ) from error
    return Figure
