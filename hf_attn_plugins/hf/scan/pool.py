"""Families in processes of their own, with a limit of time and memory each; results are kept as they come."""

from __future__ import annotations

import json
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from hf_attn_plugins.hf.scan.families import Family

Results = dict[str, dict[str, Any]]


def scan(
    chosen: Iterable[Family],
    trial: Callable[[Family], dict[str, Any]],
    *,
    workers: int = 1,
    seconds: int = 120,
    gigabytes: int = 6,
    results: Results | None = None,
    save: Callable[[Results], None] = lambda _: None,
    say: Callable[[dict[str, Any]], None] = lambda _: None,
) -> Results:
    """Run `trial` on every family that `results` does not hold yet.

    A forked child has Transformers imported already, and dies alone: a family that hangs, is killed for memory or
    crashes the interpreter is recorded as one that was not run.

    Args:
        workers: families at a time.
        seconds, gigabytes: limits of one family, of wall clock and of address space.
        save: called with all results after each family.
    """
    import torch

    torch.set_num_threads(1)  # threads do not survive a fork
    results = {} if results is None else results
    waiting = [family for family in chosen if family.name not in results]
    running: dict[int, tuple[Family, int, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                family = waiting.pop(0)
                pid, pipe = _start(family, trial, gigabytes)
                running[pid] = (family, pipe, time.monotonic() + seconds)
            for pid, (family, pipe, deadline) in list(running.items()):
                done, _ = os.waitpid(pid, os.WNOHANG)
                late = time.monotonic() > deadline
                if not done and not late:
                    continue
                if not done:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                del running[pid]
                results[family.name] = _result(family, pipe, f"no result within {seconds} s" if late else "")
                save(results)
                say(results[family.name])
            time.sleep(0.02)
    finally:
        for pid in running:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    return results


def _start(family: Family, trial: Callable[[Family], dict[str, Any]], gigabytes: int) -> tuple[int, int]:
    """Fork a child that writes its result, as JSON, to an unnamed file."""
    pipe = os.memfd_create(f"scan-{family.name}")
    pid = os.fork()
    if pid:
        return pid, pipe
    try:
        limit = gigabytes << 30
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        try:
            text = json.dumps(trial(family))
        except BaseException as error:
            text = json.dumps({"died": f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"})
        os.write(pipe, text.encode())
    finally:
        os._exit(0)


def _result(family: Family, pipe: int, late: str) -> dict[str, Any]:
    with os.fdopen(pipe, "rb") as file:
        file.seek(0)
        text = file.read()
    empty = {"name": family.name, "class": family.model_class, "kind": family.kind, "built": False, "plugins": {}}
    if late or not text:
        return {**empty, "why": late or "its process died"}
    found = json.loads(text)
    return {**empty, "why": found["died"]} if "died" in found else found


def load(path: Path) -> Results:
    """Results saved before; none where there is no file."""
    return json.loads(path.read_text())["families"] if path.exists() else {}
