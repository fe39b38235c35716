"""`hf-attn eval`: one model, several attention implementations, the same prompts; results in a run folder."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from hf_attn_plugins.bench.hardware import describe
from hf_attn_plugins.hf.inputs.load import load
from hf_attn_plugins.ui.progress import terminal

from . import baselines
from .configuration import Configuration, configuration
from .records import RunFolder
from .report.command import finish, show
from .running.environment import command_line, environment, now, processes
from .running.network import network

# Keys that do not change what is measured: a run may be resumed with others.
FREE = ("online", "device", "device_map")


def run(arguments: argparse.Namespace) -> int:
    """Run or resume; returns 0, or 1 where some sample failed.

    Raises:
        ValueError, ImportError: nothing can be run with these options. Nothing has been written then.
    """
    flags = {k: v for k, v in vars(arguments).items() if k not in ("config", "retry_errors")}
    settings = configuration(arguments.config, flags)
    folder = RunFolder(settings.out)
    resumed = _check_folder(folder, settings)
    with network(settings.online), processes(settings.device) as group:
        from .running.runner import Runner

        model, tokenizer = load(
            settings.model,
            settings.dtype,
            group.device if settings.device_map is None else settings.device,
            settings.device_map,
            settings.revision,
            settings.trust_remote_code,
        )
        with baselines.registered():
            runner = Runner(settings, model, tokenizer, process=group.process, processes=group.processes)
            if group.process == 0:
                _begin(folder, settings, model.device, group.processes, resumed)
            group.wait()
            with terminal(group.process == 0, transient=False) as progress:
                runner.run(folder, retry_errors=arguments.retry_errors, progress=progress)
            group.wait()
        return _finish(folder) if group.process == 0 else 0


def _check_folder(folder: RunFolder, settings: Configuration) -> bool:
    """Whether the folder holds this run's beginning.

    Raises:
        ValueError: it holds another run, or something else.
    """
    if not folder.path.exists() or not any(folder.path.iterdir()):
        return False
    if not folder.path.joinpath("config.json").is_file():
        raise ValueError(f"--out {folder.path} is a folder with other files in it: choose another.")
    known, wanted = folder.read_json("config"), settings.as_dict()
    before = {**Configuration().as_dict(), **known}  # runs of earlier versions lack keys: they ran with the defaults
    other = [name for name in wanted if name not in FREE and before.get(name) != wanted[name]]
    if other:
        differences = "; ".join(f"{name}: {before.get(name)!r} there, {wanted[name]!r} here" for name in other)
        raise ValueError(f"--out {folder.path} holds another run ({differences[:400]}): choose another folder.")
    return True


def _begin(folder: RunFolder, settings: Configuration, device: torch.device, count: int, resumed: bool) -> None:
    if not resumed:
        folder.write_json("environment", environment(device, count))
        folder.write_json("config", settings.as_dict())
        return
    facts = folder.read_json("environment")
    again: dict[str, Any] = {"date": now(), "command": command_line()}
    if facts.get("hardware") != describe(device):
        again["hardware"] = describe(device)
    folder.write_json("environment", {**facts, "resumed": [*facts.get("resumed", []), again]})


def _finish(folder: RunFolder) -> int:
    """Write metrics and reports, say where they lie and what failed."""
    show(finish(folder.path), folder.path)
    errors = [p for p in folder.predictions().values() if p.error]
    for prediction in errors[:3]:
        print(f"failed: {prediction.sample} with {prediction.attn}: {prediction.error}", file=sys.stderr)
    if errors:
        count = f"{len(errors)} answers" if len(errors) > 1 else "1 answer"
        print(f"{count} failed, as recorded in {folder.path}: --retry-errors asks again.", file=sys.stderr)
    return 1 if errors else 0
