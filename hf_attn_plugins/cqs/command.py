"""`hf-attn plan cqs`: summary and costs of a plan; with --steps the Scheduler's lists and every worker's matrices."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator

import hf_attn_plugins.cqs.planning.cost as cost
from hf_attn_plugins.cqs.options import MOST_WORKERS
from hf_attn_plugins.cqs.planning.scheduler import Plan, default_workers, plan

SHOWN_BELOW = 30  # tokens; the paper's notebook prints its lists below this length, too
ITEM_SIZES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--length", type=int, required=True, help="number of tokens N")
    parser.add_argument(
        "--workers", type=_numbers, help="number of workers W, or one per level like 7,7; default: by length or budget"
    )
    parser.add_argument(
        "--interest-set", type=_numbers, help="difference cover of Z_W, like 0,1,5; default: the smallest"
    )
    parser.add_argument(
        "--steps",
        action="store_true",
        help=f"also print the paper's demonstration: lists, workers, tiler; for fewer than {SHOWN_BELOW} tokens",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the demonstration's Q, K, V")
    parser.add_argument("--dim", type=int, default=5, help="elements per row of the demonstration's Q, K, V")
    parser.add_argument("--draw", metavar="FILE.png", help="write the partition and the lengths as a picture")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--budget", type=cost.parse_bytes, help="memory for one worker at a time, like 8GiB")
    parser.add_argument("--full", action="store_true", help="costs of all pairs instead of causal attention")
    parser.add_argument("--heads", type=int, default=32, help="query heads, for the costs; default 32")
    parser.add_argument("--kv-heads", type=int, default=8, help="key heads, for the costs; default 8")
    parser.add_argument("--head-dim", type=int, default=128, help="elements per head, for the costs; default 128")
    parser.add_argument("--dtype", choices=ITEM_SIZES, default="bfloat16", help="for the costs; default bfloat16")


def run(arguments: argparse.Namespace) -> None:
    """Print the plan that the options ask for.

    Raises:
        ValueError: the length, a number of workers, an interest set, a size or the budget is not possible; the message
            says which.
    """
    shape = _shape(arguments)
    division = _plan(arguments, shape)
    if arguments.steps and not _shown(arguments):
        raise ValueError(
            f"--steps: lists and matrices are printed for fewer than {SHOWN_BELOW} tokens and one level of workers."
        )
    if arguments.draw:
        from hf_attn_plugins.cqs.show.draw import draw

        draw(division, arguments.draw)
    if arguments.json:
        print(json.dumps(_numbers_of(division, shape, arguments)))
        return
    for line in _text(division, shape, arguments):
        print(line)


def _text(division: Plan, shape: cost.CallShape, arguments: argparse.Namespace) -> Iterator[str]:
    from hf_attn_plugins.cqs.show import text as show
    from hf_attn_plugins.cqs.show.demo import demonstrate

    yield f"N = {division.num_tokens}, W = {division.num_workers}, interest set {list(division.interest_set)}"
    yield from show.summary(division)
    if not arguments.steps or arguments.budget is not None:
        yield from show.costs(division, shape, not arguments.full, arguments.budget, cost.WORKSPACE)
    if arguments.steps:
        demo = demonstrate(division, arguments.dim, arguments.seed)
        yield from show.scheduler(division, arguments.dim)
        yield from show.workers_and_tiler(demo)
        yield f"CQS Attention results is correct:\n{demo.is_correct()}"
    elif _shown(arguments):
        yield "--steps prints the Scheduler's lists, every worker's matrices and the Tiler's sums."


def _numbers_of(division: Plan, shape: cost.CallShape, arguments: argparse.Namespace) -> dict:
    from hf_attn_plugins.cqs.show import text as show
    from hf_attn_plugins.cqs.show.demo import demonstrate, memory_summary

    numbers = {
        "num_tokens": division.num_tokens,
        "num_workers": [level.num_workers for level in division.levels],
        "interest_set": [list(level.interest_set) for level in division.levels],
        "summary": memory_summary(division),
        "balance": {"all_pairs": division.balance(), "causal": division.balance(is_causal=True)},
        "cost": show.cost_numbers(division, shape, not arguments.full, arguments.budget, cost.WORKSPACE),
    }
    if _shown(arguments):
        workers = range(division.num_workers)
        demo = demonstrate(division, arguments.dim, arguments.seed)
        numbers |= {
            "token_groups": [list(group) for group in division.token_groups],
            "quorums": division.quorums,
            "undistilled_pairs": division.undistilled_pairs,
            "distilled_pairs": division.distilled_pairs,
            "distilled_quorums": division.distilled_quorums,
            "material": division.material,
            "tasks": [division.tasks(w) for w in workers],
            "bans": [division.bans(w) for w in workers],
            "local_bans": [division.local_bans(w) for w in workers],
            "attention": demo.attention.tolist(),
            "correct": demo.is_correct(),
        }
    return numbers


def _shown(arguments: argparse.Namespace) -> bool:
    one_level = arguments.workers is None or len(arguments.workers) == 1
    return bool(arguments.length < SHOWN_BELOW and one_level)


def _plan(arguments: argparse.Namespace, shape: cost.CallShape) -> Plan:
    workers, chosen = arguments.workers, arguments.interest_set
    if workers is None and arguments.budget is not None:
        return cost.choose(arguments.length, shape, arguments.budget, cost.WORKSPACE)
    if workers is None and chosen is not None:
        raise ValueError(f"--interest-set {','.join(map(str, chosen))} needs --workers, the number it is a cover for.")
    if workers is None:
        workers = [default_workers(arguments.length)]
    for count in workers:
        if not 1 <= count <= MOST_WORKERS:
            raise ValueError(f"--workers {count}: at least 1 worker and at most {MOST_WORKERS} can be planned.")
    return plan(arguments.length, workers, None if chosen is None else [chosen] + [None] * (len(workers) - 1))


def _shape(arguments: argparse.Namespace) -> cost.CallShape:
    for name in ("heads", "kv_heads", "head_dim", "dim"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(arguments, name)}: at least 1 is needed.")
    size = ITEM_SIZES[arguments.dtype]
    return cost.CallShape(arguments.heads, arguments.kv_heads, arguments.head_dim, arguments.head_dim, size)


def _numbers(text: str) -> list[int]:
    """Whole numbers from a comma-separated list."""
    try:
        return [int(part) for part in text.replace("x", ",").split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: whole numbers with commas between them, like 0,1,5") from None
