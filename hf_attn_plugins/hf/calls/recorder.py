"""Open traces: which modules report, and how a call reports, traced graphs included.

`hap.trace` puts a number on every attention module of a model (`ATTRIBUTE`); a call of that module reports to the
recorder of that number. The number is a plain integer, so torch.compile makes a graph with reports while a trace is
open, and goes back to the graph without them afterwards. `OPEN` is the one global place.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.core.decision import CallFacts, Decision
from hf_attn_plugins.tiled.decide import decide as decide_tiles

ATTRIBUTE, COUNTER = "hf_attn_trace", "hf_attn_trace_counter"
OPEN: dict[int, list[Decision]] = {}
_NUMBERS, _ORDER = itertools.count(1), itertools.count()


def on(module: nn.Module) -> int | None:
    """The number of the trace that is open on a module, None where there is none."""
    return getattr(module, ATTRIBUTE, None) if OPEN else None  # a module is slow to say that it has no attribute


@contextlib.contextmanager
def opened(modules: Iterable[nn.Module]) -> Iterator[list[Decision]]:
    """A trace open on these modules for a while; they then report to the trace that was open before, if any."""
    number = next(_NUMBERS)
    held: list[Any] = list(modules)
    before = [(getattr(m, ATTRIBUTE, None), getattr(m, COUNTER, None)) for m in held]
    for module in held:
        setattr(module, ATTRIBUTE, number)
        setattr(module, COUNTER, torch.zeros((), dtype=torch.long))
    try:
        yield OPEN.setdefault(number, [])
    finally:
        for module, (old_number, old_counter) in zip(held, before, strict=True):
            if old_number is None:
                delattr(module, ATTRIBUTE)
                delattr(module, COUNTER)
            else:
                setattr(module, ATTRIBUTE, old_number)
                setattr(module, COUNTER, old_counter)
        del OPEN[number]


@contextlib.contextmanager
def watched(model: nn.Module, seen: list[tuple[nn.Module, Decision]]) -> Iterator[None]:
    """Collect every decision of a model together with the module that made the call."""
    with contextlib.ExitStack() as stack:
        lists = [(module, stack.enter_context(opened([module]))) for module in model.modules()]
        try:
            yield
        finally:
            numbered = [(decision.order, module, decision) for module, made in lists for decision in made]
            seen += [(module, decision) for _, module, decision in sorted(numbered, key=lambda item: item[0])]


def note(trace: int, module: nn.Module, method: Any, chosen: Any, call: CallFacts, options: Any, seen: Any) -> None:
    """Report one call of `module`, for which `method` was named and `chosen` computes."""
    layer = getattr(module, "layer_idx", None)
    if call.traced:
        reason = "" if chosen.name == method.name else _reason(seen)
        start = -1 if call.start is None else call.start
        names = "+".join(seen.recognised)
        _record(
            getattr(module, COUNTER), trace, -1 if layer is None else layer, method.name, chosen.short, reason, names,
            call.rows, call.keys, call.batch, start, seen.is_causal,
        )  # fmt: skip
        return
    made = chosen.decision(call, options)
    reason = made.reason if chosen.name == method.name else _reason(seen)
    add(trace, made.of_call(plugin=method.name, reason=reason), call, layer, seen.recognised, seen.is_causal)


def _reason(seen: Any) -> str:
    return "not causal self-attention" if seen.recognised else "a mask tensor that no plan can be read from"


def add(
    trace: int, made: Decision, call: CallFacts, layer: int | None, names: tuple[str, ...], is_causal: bool
) -> None:
    """Put a decision, completed by its call, into an open trace."""
    if not is_causal:
        made = made.of_call(attended=0, causal=0)
    whole = made.of_call(layer=layer, rows=call.rows, keys=call.keys, batch=call.batch, mask=names, is_causal=is_causal)
    if trace in OPEN:
        OPEN[trace].append(whole.of_call(order=next(_ORDER)))


def tag(trace: int | None, module: nn.Module, seen: Any) -> str:
    """What `planned_op` needs to report from inside a graph, as one string; empty where no trace is open."""
    if trace is None:
        return ""
    layer = getattr(module, "layer_idx", None)
    return f"{trace}|{-1 if layer is None else layer}|" + "+".join(seen.recognised)


@torch.library.custom_op("hf_attn_plugins::record", mutates_args=("counter",))
def _record(
    counter: Tensor,
    trace: int,
    layer: int,
    plugin: str,
    short: str,
    reason: str,
    names: str,
    rows: int,
    keys: int,
    batch: int,
    start: int,
    is_causal: bool,
) -> None:
    """One report of a traced graph, made each time the graph runs; `counter` keeps the operator in the graph."""
    from hf_attn_plugins.core.mask import Mask

    counter.add_(1)
    call = CallFacts(rows, keys, batch, None if start < 0 else start, Mask(causal=is_causal))
    made = decide_tiles(call)
    method = short if made.method == "tiled" else made.method
    recognised = tuple(names.split("+")) if names else ()
    made = made.of_call(method=method, plugin=plugin, reason=reason)
    add(trace, made, call, None if layer < 0 else layer, recognised, is_causal)


@_record.register_fake
def _(counter: Tensor, *_: Any) -> None:
    return None
