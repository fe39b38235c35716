"""`hf-attn plan tiled`: the tile plan of one head as text, as computed steps, as a picture and as an animation."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from hf_attn_plugins.tiled.plan import ORDERS, TilePlan

MAX_WALKED_LENGTH, MAX_WALKED_TILES = 1024, 4096
MAX_BLOCKS = 4_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `hf-attn plan tiled`."""
    parser.add_argument("--length", type=int, default=6, help="tokens (default: 6)")
    parser.add_argument("--head-dim", type=int, default=3, help="elements per token and head (default: 3)")
    parser.add_argument("--sram", type=int, default=24, help="elements that fit in fast memory (default: 24)")
    parser.add_argument("--causal", action="store_true", help="each token sees only itself and earlier ones")
    parser.add_argument("--order", choices=ORDERS, default=ORDERS[0], help=f"the outer loop (default: {ORDERS[0]})")
    parser.add_argument("--bytes", type=int, default=4, help="bytes per element in slow memory (default: 4)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random example (default: 0)")
    parser.add_argument("--steps", type=int, default=12, help="steps to print (default: 12)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument(
        "--draw", type=Path, nargs="?", const=Path("tiles.png"), metavar="FILE.png", help="draw the tiles (tiles.png)"
    )
    parser.add_argument(
        "--animate",
        type=Path,
        nargs="?",
        const=Path("tiles.gif"),
        metavar="FILE.gif",
        help="animate the tiles (tiles.gif)",
    )


def run(arguments: argparse.Namespace) -> None:
    """Print the plan, its steps and the checks; write the pictures that were asked for.

    Raises:
        ValueError: sizes do not fit, or a picture has a wrong suffix, would be too large or cannot be written.
        FileNotFoundError: the folder of a picture does not exist.
    """
    from hf_attn_plugins.tiled import animate, draw
    from hf_attn_plugins.tiled.report import (
        Example,
        checks,
        checks_text,
        plan_facts,
        plan_text,
        step_facts,
        steps_text,
    )
    from hf_attn_plugins.tiled.walkthrough import forward

    plan = TilePlan(arguments.length, arguments.head_dim, arguments.sram, arguments.causal, arguments.order)
    _check(plan, arguments)
    facts = plan_facts(plan, arguments.bytes)
    walked = plan.length <= MAX_WALKED_LENGTH and plan.count()[0] <= MAX_WALKED_TILES
    sections, steps, found = [plan_text(plan, facts)], None, None
    if walked:
        example = Example.random(plan, arguments.seed)
        done = forward(example.query, example.key, example.value, plan, example.scale)
        steps, found = [step_facts(step) for step in done.steps[: arguments.steps]], checks(plan, example)
        sections += [steps_text(done, arguments.steps)] if arguments.steps else []
        sections.append(checks_text(found))
    else:
        sections.append(
            f"No steps and no checks: they are for at most {MAX_WALKED_LENGTH:,} tokens and {MAX_WALKED_TILES:,} tiles."
        )
    written = []
    if arguments.draw:
        draw.draw_schedule(plan, arguments.draw)
        written.append(str(arguments.draw))
    if arguments.animate:  # check_animation allows only lengths that were walked through
        animate.animate(plan, done, example.value, arguments.animate)
        written.append(str(arguments.animate))
    if arguments.json:
        print(json.dumps({"plan": facts, "steps": steps, "checks": found, "files": written}, indent=2))
    else:
        print("\n\n".join(sections + [f"Wrote {name}" for name in written]))


def _check(plan: TilePlan, arguments: argparse.Namespace) -> None:
    from hf_attn_plugins.tiled import animate, draw

    if plan.num_row_blocks > MAX_BLOCKS:
        raise ValueError(
            f"{plan.num_row_blocks:,} row blocks are more than the {MAX_BLOCKS:,} this command counts: "
            "give a smaller --length or a larger --sram."
        )
    if arguments.bytes < 1:
        raise ValueError(f"--bytes {arguments.bytes}: an element takes at least 1 byte.")
    if arguments.steps < 0:
        raise ValueError(f"--steps {arguments.steps}: 0 or more steps can be printed.")
    if arguments.draw:
        draw.check_target(arguments.draw, ".png")
    if arguments.animate:
        draw.check_target(arguments.animate, ".gif")
        animate.check_animation(plan)
