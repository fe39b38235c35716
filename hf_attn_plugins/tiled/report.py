"""The output of `hf-attn plan tiled`: plan, steps and checks, as text or as values for one JSON object."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.tiled.plan import ORDERS, TilePlan, floored_blocks
from hf_attn_plugins.tiled.walkthrough import (
    Forward,
    TileStep,
    backward,
    forward,
    plain_attention,
    softmax,
    softmax_gradient,
    unnormalised_backward,
)


@dataclasses.dataclass(frozen=True)
class Example:
    """Random query, key, value and grad_out (N, d) in float64, with the scale 1/sqrt(d)."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    scale: float

    @classmethod
    def random(cls, plan: TilePlan, seed: int) -> Example:
        """Normal tensors of the plan's sizes; query and key are multiplied by 1.5."""
        generator = torch.Generator().manual_seed(seed)
        draws = torch.randn(4, plan.length, plan.head_dim, generator=generator, dtype=torch.float64)
        # Larger queries and keys give sharper weights; nearly equal weights would hide errors.
        return cls(1.5 * draws[0], 1.5 * draws[1], draws[2], draws[3], plan.head_dim**-0.5)


def plan_facts(plan: TilePlan, bytes_per_number: int) -> dict[str, Any]:
    """The integers of the plan as JSON values."""
    computed, masked, skipped = plan.count()
    moved, plain = plan.traffic(), plan.plain_traffic()
    floored, sizes = floored_blocks(plan.length, plan.head_dim, plan.sram)
    return {
        **dataclasses.asdict(plan),
        "block_keys": plan.block_keys,
        "block_rows": plan.block_rows,
        "num_key_blocks": plan.num_key_blocks,
        "num_row_blocks": plan.num_row_blocks,
        "tiles": {"computed": computed, "masked": masked, "skipped": skipped},
        "held_numbers": plan.held(),
        "bytes_per_number": bytes_per_number,
        "bytes": {"read": moved.read * bytes_per_number, "written": moved.written * bytes_per_number},
        "plain_bytes": {"read": plain.read * bytes_per_number, "written": plain.written * bytes_per_number},
        "bytes_against_plain": moved.total / plain.total,
        "floored_block_rows": floored,
        "floored_largest_block": max(sizes, default=0),
    }


def checks(plan: TilePlan, example: Example) -> dict[str, float]:
    """Largest absolute difference of each result from plain attention, and relative errors of two wrong formulas."""
    query, key, value, scale = example.query, example.key, example.value, example.scale
    leaves = [x.clone().requires_grad_() for x in (query, key, value)]
    plain = plain_attention(leaves[0], leaves[1], leaves[2], scale, plan.causal)
    exact = torch.autograd.grad(plain, leaves, example.grad_out)
    plain = plain.detach()
    both = {order: forward(query, key, value, dataclasses.replace(plan, order=order), scale) for order in ORDERS}
    done = both[plan.order]
    tiled = backward(query, key, value, done.out, done.lse, example.grad_out, plan, scale)
    slip = unnormalised_backward(query, key, value, example.grad_out, scale, plan.causal)
    weights, arriving = softmax(query @ key.T * scale), example.grad_out @ value.T
    row = weights[0]
    jacobian = torch.diag(row) - torch.outer(row, row)
    unscaled = plain_attention(query, key, value, 1.0, plan.causal)
    differences = {f"out, {order}": _furthest(both[order].out, plain) for order in ORDERS}
    for name, ours, theirs in zip(("d query", "d key", "d value"), tiled, exact, strict=True):
        differences[name] = _furthest(ours, theirs)
    differences["softmax gradient"] = _furthest(softmax_gradient(weights, arriving)[0], jacobian @ arriving[0])
    for name, ours, theirs in zip(("d query", "d key", "d value"), slip, exact, strict=True):
        differences[f"unnormalised {name}"] = _relative(ours, theirs)
    differences["unscaled out"] = _relative(unscaled, plain)
    return differences


def _furthest(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


def _relative(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|; 0 if |theirs| is rounding noise, as is d query with a single key."""
    size, error = theirs.norm().item(), (ours - theirs).norm().item()
    return error / size if size > 1e-9 else 0.0


def step_facts(step: TileStep) -> dict[str, Any]:
    """A step as JSON values; -inf becomes null, because JSON has no infinity."""
    tile = step.tile
    tensors = {
        field.name: _finite(getattr(step, field.name).tolist())
        for field in dataclasses.fields(step)
        if field.name != "tile"
    }
    return {"rows": [*tile.rows], "keys": [*tile.keys], "masked": tile.masked, **tensors}


def _finite(values: Any) -> Any:
    if isinstance(values, list):
        return [_finite(value) for value in values]
    return values if math.isfinite(values) else None


def plan_text(plan: TilePlan, facts: dict[str, Any]) -> str:
    """The plan in sentences."""
    n, d, m = plan.length, plan.head_dim, plan.sram
    counts = facts["tiles"]
    moved, plain = (facts[name]["read"] + facts[name]["written"] for name in ("bytes", "plain_bytes"))
    seen = "Each token sees itself and earlier ones." if plan.causal else "Each token sees every token."
    loop = {
        "keys-outer": "Keys outermost (FlashAttention, algorithm 1): a key block is loaded once, for all row blocks.",
        "rows-outer": "Rows outermost (FlashAttention-2): a row block stays until it has met all its key blocks.",
    }[plan.order]
    lines = [
        f"Attention of {n:,} tokens, head_dim {d}, with {m:,} elements of fast memory (SRAM). {seen}",
        "",
        "Blocks",
        f"  keys in a block  Bc = ceil(M / 4d) = ceil({m} / {4 * d}) = {plan.block_keys}"
        f"   -> {plan.num_key_blocks:,} key blocks{_last(plan.keys_of(plan.num_key_blocks - 1), plan.block_keys)}",
        f"  rows in a block  Br = min(Bc, d) = min({plan.block_keys}, {d}) = {plan.block_rows}"
        f"   -> {plan.num_row_blocks:,} row blocks{_last(plan.rows_of(plan.num_row_blocks - 1), plan.block_rows)}",
        f"  {loop}",
        f"  Tiles: {counts['computed']:,} computed, {counts['masked']:,} of them with a mask, "
        f"{counts['skipped']:,} skipped.",
        f"  Held at once: {plan.held():,} elements (K, V, Q, O, scores, each row's max and sum). "
        + ("That fits." if plan.held() <= m else "That is above M:\n  Bc counts K, V, Q and O alone, and rounds up."),
    ]
    if facts["floored_block_rows"] == 0:
        lines.append("  With floor instead of ceil there would be no block at all.")
    elif facts["floored_largest_block"] == 0:
        lines.append(f"  A split into floor(N / {facts['floored_block_rows']}) equal blocks would make none at all.")
    elif facts["floored_largest_block"] > facts["floored_block_rows"]:
        lines.append(
            f"  A split into floor(N / {facts['floored_block_rows']}) equal blocks would make blocks of "
            f"{facts['floored_largest_block']} rows,\n  more than there is room for. Here the last block is shorter."
        )
    ratio = facts["bytes_against_plain"]
    lines += [
        "",
        f"Bytes between slow (HBM) and fast memory, {facts['bytes_per_number']} per element, forward, one head",
        f"  tiled  {_pair(facts['bytes'])}",
        f"  plain  {_pair(facts['plain_bytes'])}   (writes out the N x N scores and weights)",
        f"  tiled / plain = {moved:,} / {plain:,} = {ratio:.2f}"
        + ("" if ratio < 1 else ": so small an example gains nothing; try --length 4096 --head-dim 64 --sram 25600"),
    ]
    return "\n".join(lines)


def _last(block: range, full: int) -> str:
    return "" if len(block) == full else f", the last one of {len(block)}"


def _pair(moved: dict[str, int]) -> str:
    return f"read {moved['read']:>15,}   written {moved['written']:>15,}"


def steps_text(done: Forward, limit: int) -> str:
    """The steps, one table per tile."""
    lines = [
        "Steps",
        "  score = q.k / sqrt(d). Each row keeps the largest score so far (max), the sum of exp(score - max), and the",
        "  mean of the values so far. When the max grows, the old sum is scaled by exp(old max - new max), 'old x'.",
    ]
    for number, step in enumerate(done.steps[:limit], 1):
        lines += [
            "",
            f"  Step {number} of {len(done.steps)}: {step.tile.describe()}",
            *_step_table(step),
        ]
    if len(done.steps) > limit:
        lines += ["", f"  ... and {len(done.steps) - limit} more in the same way (--steps shows more)."]
    return "\n".join(lines)


def _step_table(step: TileStep) -> list[str]:
    head = ["row", "scores", "max", "old x", "sum", "mean of the values so far"]
    body = [
        [
            str(row),
            _numbers(step.scores[i]),
            f"{_number(step.max_before[i], 'none')} ->{_number(step.max_after[i])}",
            _number(step.rescale[i]),
            f"{_number(step.sum_before[i])} ->{_number(step.sum_after[i])}",
            _numbers(step.mean[i]),
        ]
        for i, row in enumerate(step.tile.rows)
    ]
    widths = [max(len(line[column]) for line in [head, *body]) for column in range(len(head))]
    return [
        "    " + "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in [head, *body]
    ]


def _numbers(row: Tensor, most: int = 6) -> str:
    return " ".join(_number(x) for x in row[:most]) + (" ..." if len(row) > most else "")


def _number(x: Tensor, infinite: str = "hidden") -> str:
    return f"{infinite if x == -torch.inf else format(x.item(), '.2f'):>6}"


def checks_text(found: dict[str, float]) -> str:
    """The checks in sentences."""
    slips = [f"{name} {found[f'unnormalised {name}']:.0%}" for name in ("d query", "d key", "d value")]
    grads = [f"{name} {found[name]:.1e}" for name in ("d query", "d key", "d value")]
    return "\n".join(
        [
            "Checks in float64 (largest difference)",
            f"  FlashAttention, keys outermost, from plain softmax     {found['out, keys-outer']:.1e}",
            f"  FlashAttention-2, rows outermost, from plain softmax   {found['out, rows-outer']:.1e}",
            f"  backward by tiles from the saved lse, from autograd    {',  '.join(grads)}",
            f"  softmax gradient a*(g - sum(a*g)), from the Jacobian   {found['softmax gradient']:.1e}",
            "What two common slips would do (relative error)",
            f"  exp(score - max) for the weights in the backward       {',  '.join(slips)}",
            f"  scores without 1 / sqrt(d)                             out {found['unscaled out']:.0%}",
        ]
    )
