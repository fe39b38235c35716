"""Peak memory of one training step on ranks beside one process."""

from __future__ import annotations

import argparse
from typing import Any

from hf_attn_plugins.bench.ranks import reports_of
from hf_attn_plugins.commands.bench.parallel.prompt import METHODS, MIB

SETTINGS = ("model", "training_dtype")
MODULE = "hf_attn_plugins.commands.bench.parallel.training_rank"
CHECKPOINTING = "checkpointing"


def cases(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """One case for every launch, in the order of the table.

    Raises:
        ValueError: a number of ranks below 1, or a length that is not "TOKENS" or "TOKENS:checkpointing".
    """
    if min(arguments.training_ranks) < 1:
        raise ValueError(f"--training-ranks {arguments.training_ranks}: at least 1 is needed.")
    found = []
    for word in arguments.training:
        tokens, _, how = word.partition(":")
        if not tokens.isdigit() or int(tokens) < 2 or how not in ("", CHECKPOINTING):
            raise ValueError(f"--training {word}: write TOKENS or TOKENS:{CHECKPOINTING}, for example 8192.")
        for name in METHODS:
            for ranks in arguments.training_ranks:
                found.append({
                    "key": f"{name}, {word} tokens, {ranks} ranks", "name": name, "length": int(tokens),
                    "checkpointing": how == CHECKPOINTING, "ranks": ranks, "model": arguments.model,
                    "dtype": arguments.training_dtype,
                })  # fmt: skip
    return found


def measure(arguments: argparse.Namespace, case: dict[str, Any]) -> dict[str, Any]:
    """The case with the reports of its ranks."""
    found = reports_of(MODULE, case, case["ranks"], arguments.timeout)
    print(f"  peaks {' '.join(str(one['peak'] // MIB) for one in found)} MiB", flush=True)
    return {**case, "reports": found}


def rows(done: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for every launch, with the largest peak of its ranks as a share of one process."""
    found = []
    for case in done.values():
        peak = max(report["peak"] for report in case["reports"])
        alone = [
            one["reports"][0]["peak"]
            for one in done.values()
            if one["ranks"] == 1 and all(one[k] == case[k] for k in ("name", "length", "checkpointing"))
        ]
        found.append(
            {
                "method": case["name"].removesuffix("_attention"),
                "tokens": case["length"],
                "layers": case["reports"][0]["layers"],
                "checkpointing": "yes" if case["checkpointing"] else "no",
                "ranks": case["ranks"],
                "peak MiB": peak // MIB,
                "of one process": peak / alone[0] if alone else "",
                "loss": f"{case['reports'][0]['loss']:.6f}",
            }
        )
    return found
