"""Ways to fail on one rank, as functions that the ranks run."""

from __future__ import annotations

import copy
import os
import signal
import time
from typing import Any

import torch

import hf_attn_plugins as hap
from hf_attn_plugins import _version
from hf_attn_plugins.parallel import RankError
from hf_attn_plugins.parallel.comm import failure
from tests.parallel.models import build, prompt

OPTIONS = dict(block_size=5, anchor_size=3, query_size=4)


def quick() -> None:
    """Shorter beats: the tests wait for silence."""
    failure.BEAT, failure.GONE = 0.2, 2.0


def _act(what: str) -> None:
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "hang":
        time.sleep(300)
    if what == "memory":
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
    raise AssertionError(what)


def broken(rank: int, size: int, *, who: int, what: str, forward: int, timeout: float) -> dict[str, Any]:
    """Generate, with `what` happening on rank `who` in the second layer of the model's forward number `forward`."""
    quick()
    model, seen = build("llama"), []

    def sabotage(*_: Any) -> None:
        seen.append(None)
        if rank == who and len(seen) == forward + 1:
            _act(what)

    handle = model.model.layers[1].register_forward_pre_hook(sabotage)
    began = time.monotonic()
    try:
        with hap.context_parallel(model, "star_attention", timeout=timeout, **OPTIONS):
            model.generate(**prompt(length=23, batch=1), max_new_tokens=6, do_sample=False)
    except (RankError, torch.OutOfMemoryError) as error:
        return {
            "error": f"{type(error).__name__}: {error}",
            "rank": getattr(error, "rank", None),
            "seconds": time.monotonic() - began,
            "implementation": model.config._attn_implementation,
        }
    finally:
        handle.remove()
    return {"error": None}


def broken_training(
    rank: int, size: int, *, who: int, what: str, exchange: int, timeout: float, name: str
) -> dict[str, Any]:
    """Train two steps, with `what` happening on rank `who` just before its exchange number `exchange`."""
    quick()
    model, done = copy.deepcopy(build("llama")).train(), [0]
    options = OPTIONS if name == "star_attention" else {}
    batch = prompt(length=23, batch=1)
    began = time.monotonic()
    try:
        with hap.context_parallel(model, name, timeout=timeout, **options) as session:
            real = session.group._exchange

            def sabotaged(*arguments: Any) -> Any:
                done[0] += 1
                if rank == who and done[0] == exchange:
                    _act(what)
                return real(*arguments)

            session.group._exchange = sabotaged
            for _ in range(2):
                model(**batch, labels=batch["input_ids"]).loss.backward()
                session.sum_gradients()
    except (RankError, torch.OutOfMemoryError) as error:
        return {
            "error": f"{type(error).__name__}: {error}",
            "rank": getattr(error, "rank", None),
            "seconds": time.monotonic() - began,
        }
    return {"error": None, "exchanges": done[0]}


def differ(rank: int, size: int, *, how: str) -> dict[str, Any]:
    """Rank 1 does something else than the others; the same ranks work again afterwards."""
    quick()
    model, inputs, options = build("llama"), prompt(length=23, batch=1), dict(OPTIONS)
    other, version, computed = rank == 1, _version.__version__, []
    if other and how == "inputs":
        inputs["input_ids"][0, 7] += 1
    if other and how == "length":
        inputs = prompt(length=22, batch=1)
    if other and how == "options":
        options["block_size"] = 6
    if other and how == "method":
        options = {}
    if other and how == "version":
        _version.__version__ = "9.9.9"
    weight = model.lm_head.weight
    kept = weight.detach().clone()
    if other and how == "model":
        weight.data[0, 0] += 1
    handle = model.model.layers[0].register_forward_pre_hook(lambda *_: computed.append(None))
    name = "tiled_attention" if other and how == "method" else "star_attention"
    try:
        with hap.context_parallel(model, name, timeout=20, **options):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        error = None
    except ValueError as raised:
        error = str(raised)
    finally:
        handle.remove()
        weight.data.copy_(kept)
        _version.__version__ = version
    with hap.context_parallel(model, "star_attention", timeout=20, **OPTIONS):
        again = model.generate(**prompt(length=23, batch=1), max_new_tokens=2, do_sample=False)
    return {"error": error, "computed": len(computed), "again": again.tolist()}
