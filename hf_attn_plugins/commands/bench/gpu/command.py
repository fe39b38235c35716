"""`hf-attn bench gpu`: everything that a CUDA or ROCm GPU has to show, in eight minutes, the most valuable first."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from hf_attn_plugins.bench.gpu_timing import matrix_peak
from hf_attn_plugins.bench.hardware import describe
from hf_attn_plugins.bench.ranks import launched
from hf_attn_plugins.commands.bench.gpu.cases import FLEX, Case, cases, time_case
from hf_attn_plugins.commands.bench.gpu.checks import FEATURES, as_line, check
from hf_attn_plugins.commands.bench.gpu.record import CHECK, RANKS, TIME, Record
from hf_attn_plugins.core.gpu import arch_of
from hf_attn_plugins.kernels import measured

PEAK_SIZE = 8192
RANK_CASE = {"length": 8192, "heads": 8, "kv_heads": 2, "head_dim": 128, "layers": 2, "dtype": "bfloat16"}
# Method -> its options over ranks, and the method that one device computes the same result with.
METHODS = {"tiled_attention": {}, "cqs_attention": {}, "star_attention": {"block_size": 1024}}


class Step(NamedTuple):
    """One step: its name in the record, and what to run, which returns JSON values."""

    name: str
    run: Callable[[], dict[str, Any]]


def run(arguments: argparse.Namespace, device: torch.device | None = None) -> int:
    """Check, time, and write after every step; a run that was interrupted is continued.

    Args:
        device: a CPU in a rehearsal; None takes the current GPU.

    Returns:
        0, or 1 where a result is wrong or a check could not run.

    Raises:
        ValueError: there is no GPU, or a length, a head dim, the repeats or the minutes are too small.
    """
    if min([*arguments.lengths, *arguments.head_dims, arguments.repeats]) < 1:
        raise ValueError("--lengths, --head-dims and --repeats must be at least 1.")
    if not arguments.minutes > 0:
        raise ValueError(f"--minutes {arguments.minutes}: more than 0 is needed.")
    if device is None:
        if not torch.cuda.is_available():
            raise ValueError("there is no CUDA or ROCm device: `hf-attn bench triton --static` needs none.")
        device = torch.device("cuda", torch.cuda.current_device())
    deadline = time.monotonic() + 60 * arguments.minutes
    record = Record(arguments.out, facts_of(device), settings_of(arguments), arguments.anew)
    if record.resumed:
        print(f"{record.path} holds {record.resumed} steps of an earlier run, which are kept (--anew: not)", flush=True)
    if arguments.tune:
        from hf_attn_plugins.commands.bench.gpu.tune import tune

        tune(arguments.tune, device, arguments.head_dims, time.monotonic() + 30 * arguments.minutes)
    todo = steps(arguments, device)
    print(
        f"{len(todo)} steps, none begins after {arguments.minutes:g} minutes; {record.page} grows with each", flush=True
    )
    left = carry_out(todo, record, device, deadline)
    for step in left:
        print(f"no time was left for: {step}", flush=True)
    record.finish(left)
    wrong = record.wrong()
    print(f"written to {record.page} and {record.path}" + (f"; wrong: {', '.join(wrong)}" if wrong else ""), flush=True)
    if arguments.save:
        rows = record.rows()
        print(f"{len(rows)} rows saved to {measured.save(rows)}" if rows else "nothing was timed: nothing is saved")
    elif record.rows():
        print("run it again with --save to let these times choose the kernels here: it goes on from what is written")
    return 1 if wrong else 0


def carry_out(todo: list[Step], record: Record, device: torch.device, deadline: float) -> list[str]:
    """Run the steps that the record lacks, until the deadline.

    Returns:
        the names of the steps that were not run. They are all that follow, too, where an error leaves the GPU unusable.
    """
    left: list[str] = []
    for step in todo:
        if step.name in record:
            continue
        if left or time.monotonic() > deadline:
            left.append(step.name)
            continue
        record.begin(step.name)
        try:
            found = step.run()
        except KeyboardInterrupt:
            record.finish([])  # the step is not to blame: the next run repeats it
            raise
        except Exception as error:  # a step that cannot run must not take the others with it
            found = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        record.end(step.name, found)
        print(line_of(step.name, found), flush=True)
        if "error" in found and not usable(device):
            print(
                "the GPU is unusable after this error: run the command again, it goes on behind this step", flush=True
            )
            left += [each.name for each in todo if each.name not in record and each.name not in left]
            break
    return left


def usable(device: torch.device) -> bool:
    """Whether the GPU still answers: after an illegal access every call of a process fails."""
    try:
        torch.zeros(1, device=device).add_(1).item()
    except RuntimeError:
        return False
    return True


def steps(arguments: argparse.Namespace, device: torch.device) -> list[Step]:
    """All steps, the most valuable first."""

    def checked(name: str, dtype: torch.dtype, kernel: str | None) -> Step:
        title = f"{CHECK}: {name}, {str(dtype)[6:]}, {kernel or 'default'}"
        return Step(title, lambda: check(name, dtype, kernel, device))

    def timed(case: Case) -> Step:
        return Step(
            f"{TIME}: {case.name}", lambda: {"case": list(case), **time_case(case, device, arguments.repeats)}
        )  # fmt: skip

    timings = [timed(case) for case in cases(arguments.lengths, arguments.head_dims)]
    first = [step for step in timings if step.name.startswith((f"{TIME}: forward", f"{TIME}: plan"))]
    plans = [name for name in FEATURES if FEATURES[name].is_plan]
    found = [
        *(checked(name, torch.bfloat16, None) for name in FEATURES),
        *(checked(name, torch.bfloat16, FLEX) for name in plans),
        *(checked(name, torch.bfloat16, "triton") for name in FEATURES),
        Step("peak", lambda: {"tflops": matrix_peak(device, PEAK_SIZE)}),
        *first[: max(4, len(first) // 2)],
    ]
    found += [step for step in timings if step not in found]
    if device.type == "cpu" or torch.cuda.device_count() > 1:
        found.append(Step(f"{RANKS}: context_parallel", lambda: on_ranks(device)))
    return found + [checked(name, torch.float32, kernel) for kernel in ("triton", None) for name in FEATURES]


def on_ranks(device: torch.device, ranks: int | None = None) -> dict[str, Any]:
    """`rank` on all GPUs: what rank 0 found, by method.

    Raises:
        OSError: the launch failed; the message has its first error.
    """
    ranks = ranks or max(2, torch.cuda.device_count())
    with launched("hf_attn_plugins.commands.bench.gpu.rank", rank_case(device.type), ranks, 240) as folder:
        return json.loads((folder / "out.json").read_text(encoding="utf-8"))


def rank_case(device: str) -> dict[str, Any]:
    """What `rank` runs on devices of a type: "cuda", or "cpu" for a rehearsal."""
    alone = dict.fromkeys(METHODS, "sdpa") | {"star_attention": "star_attention"}
    return {**RANK_CASE, "device": device, "methods": METHODS, "alone": alone}


def facts_of(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    facts = describe(device)
    return facts | {"arch": arch_of(device), "gpus": torch.cuda.device_count()} if device.type == "cuda" else facts


def settings_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """What has to agree for one run to continue another."""
    names = ("lengths", "head_dims", "repeats")
    return {name: getattr(arguments, name) for name in names} | {"versions": measured.versions()}


def line_of(step: str, found: dict[str, Any]) -> str:
    """A step's result on one line."""
    if "error" in found:
        return f"FAILED: {step}: {found['error']}"
    if "errors" in found:
        return as_line(step.removeprefix(f"{CHECK}: "), found)
    shown = found.get("ms", found)
    words = [f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in shown.items()]
    return f"{step}: {'  '.join(words)}"
