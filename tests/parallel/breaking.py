"""Ways to fail on one rank, as functions that the ranks run."""

from __future__ import annotations

import contextlib
import copy
import os
import resource
import signal
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

import hf_attn_plugins as hap
from hf_attn_plugins import _version
from hf_attn_plugins.hf.compat import cache_keyword
from hf_attn_plugins.parallel import RankError
from hf_attn_plugins.parallel.comm import failure
from hf_attn_plugins.parallel.comm.group import Group
from tests.parallel.models import build, prompt

OPTIONS = dict(block_size=5, anchor_size=3, query_size=4)


def quick() -> None:
    """Shorter beats: the tests wait for silence."""
    failure.BEAT, failure.GONE = 0.2, 2.0


def act(what: str) -> None:
    if what == "kill":  # also what Linux does to a process when memory runs out
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "stop":  # as a process that waits for its disk: it keeps its connections, and its beat ends, too
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "hang":
        time.sleep(300)
    if what == "memory":
        raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
    if what == "limit":
        _allocate_beyond_the_limit()
    raise AssertionError(what)


def _allocate_beyond_the_limit() -> None:
    """The error of PyTorch's CPU allocator where the system gives no more memory: a `RuntimeError` of several lines."""
    with open("/proc/self/statm", encoding="ascii") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**26, before[1]))
    try:
        torch.empty(2**31, dtype=torch.uint8)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def broken(rank: int, size: int, *, who: int, what: str, forward: int, timeout: float) -> dict[str, Any]:
    """Generate, with `what` happening on rank `who` in the second layer of the model's forward number `forward`."""
    quick()
    model, seen = build("llama"), []

    def sabotage(*_: Any) -> None:
        seen.append(None)
        if rank == who and len(seen) == forward + 1:
            act(what)

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
            real = session.group._start

            def sabotaged(*arguments: Any) -> Any:
                done[0] += 1
                if rank == who and done[0] == exchange:
                    act(what)
                return real(*arguments)

            session.group._start = sabotaged
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


def broken_generation(
    rank: int, size: int, *, who: int, what: str, where: str, share: float, timeout: float, name: str
) -> dict[str, Any]:
    """A conversation of three turns, with `what` happening on rank `who`.

    Args:
        where: "before" an exchange, "within" one (entered, nothing sent), one that is "posted", or in a "layer".
        share: at which of them, 0 to 1: a share of those that an undisturbed conversation has.
    """
    quick()
    model = build("llama")
    with disturbed(model, where, None) as seen:
        converse(model, name, timeout)
    count = len(seen)
    fail = (lambda: act(what)) if rank == who else (lambda: None)
    began = time.monotonic()
    try:
        with disturbed(model, where, int(share * count), fail):
            converse(model, name, timeout)
    except (RankError, RuntimeError) as error:
        return {
            "error": f"{type(error).__name__}: {error}",
            "rank": getattr(error, "rank", None),
            "seconds": time.monotonic() - began,
            "implementation": model.config._attn_implementation,
            "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()),
            "count": count,
        }
    return {"error": None, "count": count}


def converse(model: Any, name: str, timeout: float) -> None:
    """A prompt, a turn that is dealt, and one that every rank computes; tokens are generated after each."""
    options = OPTIONS if name == "star_attention" else {}
    with hap.context_parallel(model, name, timeout=timeout, min_turn=6, **options):
        ids, cache = prompt(length=23, batch=1)["input_ids"], None
        for turn in (9, 2, 0):
            done = model.generate(
                ids, **{cache_keyword(model): cache}, max_new_tokens=3, do_sample=False, return_dict_in_generate=True
            )
            cache = done.past_key_values
            ids = torch.cat([done.sequences, prompt(length=turn, batch=1, seed=turn)["input_ids"]], 1)


@contextlib.contextmanager
def disturbed(model: Any, where: str, index: int | None, fail: Any = None) -> Iterator[list[None]]:
    """Call `fail` at place number `index` of the places `where`; gives a list with one element per place passed."""
    seen: list[None] = []

    def passing(*_: Any) -> None:
        seen.append(None)
        if index == len(seen) - 1:
            fail()

    real = Group._start

    def start(self: Group, what: str, sent: int, received: int, post: Any) -> Any:
        def posting() -> Any:
            if where == "within":
                passing()
            return post()

        if where == "before":
            passing()
        finish = real(self, what, sent, received, posting)
        if where == "posted":
            passing()
        return finish

    handles = [layer.register_forward_pre_hook(passing) for layer in model.model.layers if where == "layer"]
    try:
        with mock.patch.object(Group, "_start", start):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


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
