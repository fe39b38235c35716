"""What a run was made with, and the processes it is spread over."""

from __future__ import annotations

import contextlib
import datetime
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from hf_attn_plugins.bench.hardware import describe

PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "wonderwords", "hf-attn-plugins")


def command_line() -> list[str]:
    """The command as it was typed, without the folder of the program."""
    return [Path(sys.argv[0]).name, *sys.argv[1:]]


def environment(device: torch.device, count: int) -> dict[str, Any]:
    """environment.json: hardware, versions, command, date, threads, processes."""
    return {
        "hardware": describe(device),
        "versions": {name: _version(name) for name in PACKAGES},
        "command": command_line(),
        "date": now(),
        "threads": torch.get_num_threads(),
        "processes": count,
    }


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@dataclass(frozen=True)
class Group:
    """The processes of a run: this one's number, how many there are, its device, and a barrier."""

    process: int
    processes: int
    device: str | None
    wait: Callable[[], None]


@contextlib.contextmanager
def processes(device: str | None) -> Iterator[Group]:
    """The group that `accelerate launch` (or torchrun) has started, or this process alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Group(0, 1, device, lambda: None)
        return
    from accelerate import PartialState

    state = PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    try:
        yield Group(state.process_index, state.num_processes, str(state.device), state.wait_for_everyone)
    finally:
        state.destroy_process_group()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
