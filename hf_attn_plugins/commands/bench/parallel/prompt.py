"""A real model's prompt on ranks beside one process: tokens, prefill time, peak memory and what overlap gains."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

from hf_attn_plugins.bench.ranks import reports_of

METHODS = ("tiled_attention", "star_attention", "cqs_attention")
SETTINGS = ("model", "prompt_dtype", "prompt_length", "prompt_ranks", "new_tokens")
MODULE = "hf_attn_plugins.commands.bench.parallel.prompt_rank"
MIB = 2**20


def check(arguments: argparse.Namespace) -> None:
    """Refuse sizes out of range.

    Raises:
        ValueError: one of them.
    """
    for name, least in (("prompt_length", 2), ("prompt_ranks", 2), ("new_tokens", 1), ("prompt_rounds", 1)):
        if getattr(arguments, name) < least:
            given = f"--{name.replace('_', '-')} {getattr(arguments, name)}"
            raise ValueError(f"{given}: at least {least} is needed.")


def measure(arguments: argparse.Namespace, name: str, index: int) -> dict[str, Any]:
    """One round of a method: {"one": report, "ranks": reports}; odd rounds start with the ranks."""
    case = {
        "name": name, "model": arguments.model, "dtype": arguments.prompt_dtype, "length": arguments.prompt_length,
        "new": arguments.new_tokens, "first": ("overlapped", "in turn")[index % 2],
    }  # fmt: skip
    sizes = {"one": 1, "ranks": arguments.prompt_ranks}
    found = {}
    for what in sorted(sizes, reverse=bool(index % 2)):
        found[what] = reports_of(MODULE, case, sizes[what], arguments.timeout)
    one, ranks = found["one"][0], found["ranks"]
    print(
        f"  one process {one['overlapped']['prefill_s']:.1f} s, ranks "
        f"{' '.join(format(each['overlapped']['prefill_s'], '.1f') for each in ranks)} s",
        flush=True,
    )
    return {"one": one, "ranks": ranks}


def rows(rounds: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for every process of every method; times are medians over the rounds, memory the largest."""
    found = []
    for name, each in rounds.items():
        wanted = each[0]["one"]["overlapped"]["tokens"]
        for place in ("one process", *(f"rank {rank}" for rank in range(len(each[0]["ranks"])))):
            own = [_of(one, place) for one in each]
            base = [one["one"]["overlapped"]["prefill_s"] for one in each]
            overlapped = [one["overlapped"] for one in own]
            row: dict[str, Any] = {"method": name.removesuffix("_attention"), "process": place}
            row["prefill s"] = statistics.median(one["prefill_s"] for one in overlapped)
            row["of one process"] = statistics.median(
                one["prefill_s"] / other for one, other in zip(overlapped, base, strict=True)
            )
            row["CPU s"] = statistics.median(one["cpu_s"] for one in overlapped)
            row["waits s"] = statistics.median(one["waits_s"] for one in overlapped)
            turns = [one["in turn"] for one in own if "in turn" in one]
            row["in turn: prefill s"], row["waits s, in turn"], row["gain"] = "", "", ""
            if turns:
                row["in turn: prefill s"] = statistics.median(one["prefill_s"] for one in turns)
                row["waits s, in turn"] = statistics.median(one["waits_s"] for one in turns)
                gain = statistics.median(
                    one["prefill_s"] / other["prefill_s"] for one, other in zip(turns, overlapped, strict=True)
                )
                row["gain"] = f"{gain:.3f}x"
            row["peak MiB"] = max(one["peak"] for one in overlapped) / MIB
            row["cache MiB"] = overlapped[0]["cache"] / MIB
            row["received MiB"] = overlapped[0]["received"] / MIB
            same = all(way["tokens"] == wanted for one in own for way in one.values())
            row["tokens"] = "same" if same else "other"
            found.append(row)
    return found


def _of(one: dict[str, Any], place: str) -> dict[str, Any]:
    return one["one"] if place == "one process" else one["ranks"][int(place.split()[1])]
