"""`hf-attn bench parallel`: bytes, memory and work per rank; a real prompt on ranks; memory of training.

Every finished measurement is kept in parallel.json, so that the command can be stopped and goes on where it was. A file
that other code or other settings wrote is refused: no table mixes two states.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from hf_attn_plugins.bench.hardware import describe
from hf_attn_plugins.commands.bench.parallel import prompt, training, volumes
from hf_attn_plugins.commands.bench.parallel.report import report
from hf_attn_plugins.core.staging import put

VOLUMES = ("length", "heads", "kv_heads", "head_dim", "layers", "dtype", "block_size", "halo_size", "workers", "rounds")


def run(arguments: argparse.Namespace) -> None:
    """Measure what is missing, then write the tables.

    Raises:
        ValueError: a size out of range, or a file of other code, settings or hardware.
        OSError: the ranks cannot be launched, or one of them failed; the message has its first error.
    """
    volumes.check(arguments)
    prompt.check(arguments)
    cases = training.cases(arguments)
    record = Record(arguments, cases)
    end = math.inf if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    for what, step in record.steps():
        if time.monotonic() > end:
            print("stopped: run the same command to go on")
            break
        print(what, flush=True)
        step()
        record.save()
    print("written to", report(record.done, volumes.notes(arguments), arguments.out))


class Record:
    """The measurements in parallel.json, by part."""

    def __init__(self, arguments: argparse.Namespace, cases: list[dict[str, Any]]) -> None:
        self.arguments, self.cases, self.path = arguments, cases, arguments.out / "parallel.json"
        given = vars(arguments)
        about = {
            "volumes": {name: given[name] for name in VOLUMES},
            "prompt": {name: given[name] for name in prompt.SETTINGS},
            "training": {name: given[name] for name in training.SETTINGS},
        }
        fresh = {"hardware": describe(), "code": code_digest(), "about": about}
        self.done: dict[str, Any] = {**fresh, "rows": [], "prompt": {}, "training": {}}
        if self.path.exists() and not arguments.anew:
            found = json.loads(self.path.read_text(encoding="utf-8"))
            differing = [name for name, value in fresh.items() if found.get(name) != value]
            if differing:
                raise ValueError(
                    f"{self.path} was measured with other {', '.join(differing)}: start again with --anew, or use "
                    "another --out."
                )
            self.done = found

    def save(self) -> None:
        """Write the file, whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.done, indent=1) + "\n"
        put(self.path, lambda path: path.write_text(text, encoding="utf-8"))

    def steps(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """(what, measurement) of everything that is not in the file yet."""
        a = self.arguments
        if "volumes" in a.only:
            for ranks in sorted(set(a.ranks) - {row["ranks"] for row in self.done["rows"]}):
                yield f"volumes: {ranks} ranks", partial(self.volumes, ranks)
        if "prompt" in a.only:
            for index in range(a.prompt_rounds):
                for key, name, link in prompt.cases(a):
                    if index >= len(self.done["prompt"].get(key, [])):
                        yield f"prompt: {key}, round {index + 1}", partial(self.prompt, key, name, link, index)
        if "training" in a.only:
            for case in self.cases:
                if case["key"] not in self.done["training"]:
                    yield f"training: {case['key']}", partial(self.training, case)

    def volumes(self, ranks: int) -> None:
        """Count and measure one number of ranks."""
        rows = self.done["rows"] + volumes.rows_of(self.arguments, ranks)
        order = [f"{self.arguments.heads}:{n}" for n in self.arguments.kv_heads]
        self.done["rows"] = sorted(rows, key=lambda row: (order.index(row["heads"]), row["ranks"]))

    def prompt(self, key: str, name: str, link: str | None, index: int) -> None:
        """One round of a method: one process and ranks, in an order that alternates."""
        self.done["prompt"].setdefault(key, []).append(prompt.measure(self.arguments, name, link, index))

    def training(self, case: dict[str, Any]) -> None:
        """One launch."""
        self.done["training"][case["key"]] = training.measure(self.arguments, case)


def code_digest() -> str:
    """SHA-256 of the package's sources: Python and C."""
    folder, found = Path(__file__).parents[3], hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".c", ".h")):
        found.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:16]
