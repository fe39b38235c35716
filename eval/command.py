"""`hf-attn eval`: one model, several attention implementations, the same prompts; results in a run folder."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from hf_attn_plugins.bench.hardware import describe
from hf_attn_plugins.hf.inputs.load import add_loading_arguments, load

from . import baselines
from .configuration import DTYPES, Configuration, configuration
from .environment import command_line, environment, now, processes
from .network import network
from .prompts import CHATS
from .records import RunFolder
from .report.command import finish, show

# Keys that do not change what is measured: a run may be resumed with others.
FREE = ("online", "device", "device_map")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options; each overrides the key of the same name in the configuration file."""
    add = parser.add_argument
    add("--config", metavar="FILE", help="YAML file, or a configuration of the package: 'default', 'demo'")
    add("--model", metavar="DIR_OR_ID", help="folder or hub id of a causal language model")
    add("--dtype", choices=DTYPES)
    add("--device", help="cpu, cuda, cuda:1, ...; CUDA when there is one, by default")
    add_loading_arguments(parser)
    add("--max-positions", type=int, metavar="N", help="the longest text that the model can take, against its config")
    add("--attn", metavar="LIST", help="implementations: sdpa,tiled_attention,star_attention:block_size=512,...")
    add("--baseline", metavar="LABEL", help="the one to compare with, as written in --attn; the first by default")
    add("--tasks", metavar="LIST", help="tasks or groups: ruler,ppl,agreement,speed,longbench/qasper,...")
    add("--lengths", metavar="LIST", help="tokens of prompt and answer: 1024,2048,...")
    add("--samples", type=int, help="samples of each task at each length")
    add("--text-samples", type=int, help="windows of the text for ppl and agreement")
    add("--rounds", type=int, help="timed rounds of the task speed, all implementations once in each")
    add("--decode-tokens", type=int, help="tokens generated in each timed round")
    add("--seed", type=int)
    add("--max-new-tokens", type=int, help="generation budget in place of each benchmark's own")
    add("--text", metavar="FILE", help="text for ppl, agreement and speed; Python's own documentation by default")
    add("--haystack", metavar="LIST", help="essay, SQuAD or HotpotQA files, datasets names, or pydoc")
    add("--data", metavar="LIST", help="where data sets are: longbench=DIR,babilong=DIR,...; hub ids by default")
    add("--chat", choices=CHATS, help="chat template: auto (where the tokenizer has one), yes, no")
    add(
        "--template-arg",
        action="append",
        dest="template_args",
        metavar="NAME=VALUE",
        help="a variable of the chat template, such as enable_thinking=false; can be given several times",
    )
    add("--context-parallel", action="store_true", default=None, help="one sample over all processes")
    add("--online", action="store_true", default=None, help="download models and data sets that are not cached")
    add("--offline", dest="online", action="store_false", default=None, help="download nothing (the default)")
    add("--out", metavar="DIR", help="run folder; an interrupted run is resumed in it")
    add("--retry-errors", action="store_true", help="when resuming, ask samples again that failed")


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
        from .runner import Runner

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
            with _progress(group.process == 0) as progress:
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


@contextlib.contextmanager
def _progress(shown: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns: list[Any] = [TextColumn("{task.description:<28}"), BarColumn(), TaskProgressColumn()]
    columns += [TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left")]
    with Progress(*columns, console=Console(stderr=True)) as bar:
        line = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(line, description=what, completed=done, total=total)
