"""A real model's prompt on ranks beside one process: tokens, prefill time, peak memory and what overlap gains."""

from __future__ import annotations

import argparse
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


def cases(arguments: argparse.Namespace) -> list[tuple[str, str, str | None]]:
    """(key, method, link) in the order of the table."""
    links = [None, *arguments.links]
    return [(name if link is None else f"{name} at {link}", name, link) for link in links for name in METHODS]


def measure(arguments: argparse.Namespace, name: str, link: str | None, index: int) -> dict[str, Any]:
    """One round of a method: {"one": report, "ranks": reports}; odd rounds start with the ranks."""
    case = {
        "name": name, "model": arguments.model, "dtype": arguments.prompt_dtype, "length": arguments.prompt_length,
        "new": arguments.new_tokens, "first": ("overlapped", "in turn")[index % 2],
    }  # fmt: skip
    sizes = {"one": 1, "ranks": arguments.prompt_ranks}
    found = {}
    for what in sorted(sizes, reverse=bool(index % 2)):
        found[what] = reports_of(MODULE, case, sizes[what], arguments.timeout, link)
    one, ranks = found["one"][0], found["ranks"]
    print(
        f"  one process {one['overlapped']['prefill_s']:.1f} s, ranks "
        f"{' '.join(format(each['overlapped']['prefill_s'], '.1f') for each in ranks)} s",
        flush=True,
    )
    return {"link": link or "memory", "one": one, "ranks": ranks}


def rows(rounds: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """One row for every process of every method; times are the smallest of all rounds, memory the largest."""
    found = []
    for key, each in rounds.items():
        wanted = each[0]["one"]["overlapped"]["tokens"]
        alone = min(one["one"]["overlapped"]["prefill_s"] for one in each)
        for place in ("one process", *(f"rank {rank}" for rank in range(len(each[0]["ranks"])))):
            own = [_of(one, place) for one in each]
            overlapped = [one["overlapped"] for one in own]
            turns = [one["in turn"]["prefill_s"] for one in own if "in turn" in one]
            same = all(way["tokens"] == wanted for one in own for way in one.values())
            best = min(overlapped, key=lambda one: one["prefill_s"])
            found.append(
                {
                    "method": key.partition("_attention")[0],
                    "link": each[0]["link"],
                    "process": place,
                    "prefill s": best["prefill_s"],
                    "of one process": best["prefill_s"] / alone,
                    "CPU s": min(one["cpu_s"] for one in overlapped),
                    "waits s": best["waits_s"],
                    "in turn s": min(turns) if turns else "",
                    "gain": f"{min(turns) / best['prefill_s']:.3f}x" if turns else "",
                    "peak MiB": max(next(iter(one.values()))["peak"] for one in own) // MIB,  # of a process's first run
                    "cache MiB": overlapped[0]["cache"] // MIB if place != "one process" else "",
                    "received MiB": overlapped[0]["received"] // MIB,
                    "tokens": "same" if same else "other",
                }
            )
    return found


def _of(one: dict[str, Any], place: str) -> dict[str, Any]:
    return one["one"] if place == "one process" else one["ranks"][int(place.split()[1])]
