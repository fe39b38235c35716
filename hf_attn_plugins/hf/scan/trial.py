"""One family: a tiny model under its default backend, then under every plugin; what differs, raises or is refused."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

import torch

from hf_attn_plugins.hf.check import check
from hf_attn_plugins.hf.configure import use
from hf_attn_plugins.hf.scan import runs
from hf_attn_plugins.hf.scan.baseline import (
    STEPS,
    Base,
    baseline,
    default_of,
    sensitivity,
    step_of,
    text_of,
)
from hf_attn_plugins.hf.scan.families import Family, config_class, model_class
from hf_attn_plugins.hf.scan.oracle import leaks, star_mask
from hf_attn_plugins.hf.scan.runs import Values, difference
from hf_attn_plugins.hf.scan.switch import implementation
from hf_attn_plugins.hf.scan.tiny.shrink import shrunk
from hf_attn_plugins.hf.scan.tiny.sizes import LENGTH
from hf_attn_plugins.hf.scan.verdict import verdict

# Sizes at which a prompt of 40 tokens takes every branch: several blocks, an anchor, a query, several workers.
OPTIONS: dict[str, dict[str, Any]] = {
    "tiled_attention": {},
    "star_attention": {"block_size": 8, "anchor_size": 4, "query_size": 6},
    "cqs_attention": {"workers": 3, "min_length": 1},
}


def trial(family: Family, compiled: Collection[str] = ()) -> dict[str, Any]:
    """Scan one family; the result is JSON-ready and never an exception.

    Args:
        compiled: the plugins that are compared under torch.compile, too.
    """
    began = time.perf_counter()
    result: dict[str, Any] = {"name": family.name, "class": family.model_class, "kind": family.kind, "plugins": {}}
    try:
        model, result["shrunken"] = build(family)
        result["parameters"] = sum(p.numel() for p in model.parameters())
        result["default"] = default_of(model)
        result["built"] = True
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        return {**result, "built": False, "why": text_of(error)}
    try:
        base = baseline(model, STEPS if compiled else STEPS[:-1])
    except ValueError as error:
        result["why"] = f"default backend not run: {' '.join(str(error).split())[:300]}"
        base = None
    if base is not None:
        result["inputs"] = list(base.inputs.plain)
        result["weights"] = base.level
        result["tolerance"] = base.tolerance
        result["default_fails"] = base.failed
        result["sensitivity"] = sensitivity(base)
    for name, options in OPTIONS.items():
        result["plugins"][name] = under(model, base, name, options, name in compiled)
    result["seconds"] = round(time.perf_counter() - began, 1)
    return result


def build(family: Family) -> tuple[Any, str]:
    """A tiny model in evaluation mode on the CPU, and how its config was shrunken ("rebuilt" or "in place").

    Raises:
        ValueError: neither way gives a model; the text is the first error.
    """
    cls, config = model_class(family), config_class(family)
    first: Exception | None = None
    for in_place in (False, True):
        try:
            torch.manual_seed(0)
            model = cls(shrunk(config(), in_place))
            return model.float().eval(), "in place" if in_place else "rebuilt"
        except Exception as error:
            first = first or error
    raise ValueError(text_of(first)) from first


def under(model: Any, base: Base | None, name: str, options: dict[str, Any], compiled: bool) -> dict[str, Any]:
    """One plugin: what check says, what ran, how far each step is from the default backend, and the verdict."""
    try:
        report = check(model, name)
    except Exception as error:
        return {"verdict": "RAISED", "why": f"check: {text_of(error)}"}
    if not report.ok:
        reasons = sorted({v.reason for v in report.verdicts if v.verdict == "refused"})
        refused: dict[str, Any] = {"verdict": "refused", "why": "; ".join(reasons) or "no attention module"}
        if base is not None and name == "tiled_attention":
            refused["forced"] = _forced(model, base, name)
        return refused
    if base is None:
        return {"verdict": "not run", "why": "no inputs"}
    found: dict[str, Any] = {"steps": {}}
    try:
        with use(model, name, **options):
            _steps(found, base, name, compiled)
            if name == "star_attention" and found["causal"]:
                _star(found, base, options)
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        return {**found, "verdict": "RAISED", "why": f"use: {text_of(error)}"}
    found.update(verdict(found, base.tolerance, name))
    if found["verdict"] == "WRONG" and base.default != "eager" and _equals_eager(base, name, options):
        found["verdict"] = "as eager"
        found["why"] = f"{base.default} and eager differ in this family, and the plugin gives eager's numbers"
    return found


def _equals_eager(base: Base, name: str, options: dict[str, Any]) -> bool:
    """Whether Transformers' own backends disagree, and the plugin agrees with the one that is written out."""
    try:
        with implementation(base.model, "eager"):
            eager = runs.forward(base.model, base.inputs.plain)
        with use(base.model, name, **options):
            mine = runs.forward(base.model, base.inputs.plain)
    except Exception:
        return False
    own = difference(base.values["forward"], eager).relative > base.tolerance["forward"]
    return own and difference(eager, mine).relative <= base.tolerance["forward"]


def _steps(found: dict[str, Any], base: Base, name: str, compiled: bool) -> None:
    """Run every step under the plugin that is switched on; record deviations and errors."""
    with runs.counted(name) as calls:
        for step in STEPS[:-1]:
            run = step_of(step, base.model, base.inputs) if step in base.values else None
            if run is not None:
                _one(found["steps"], step, run, base.values[step])
            if step == "forward":
                found["calls"], found["causal"] = len(calls), sum(call["causal"] for call in calls)
                found["unrecognised"] = sum(not call["recognised"] for call in calls)
                found["plain"] = bool(calls) and all(c["plain"] and c["rows"] == c["keys"] == LENGTH for c in calls)
    if compiled:  # the recorder would break the graph
        steps = found["steps"]
        eager = steps.get("forward", {}).get("values", base.values["forward"])
        run = step_of("compiled", base.model, base.inputs)
        assert run is not None
        _one(steps, "compiled", run, eager)
        if "error" in steps["compiled"] or steps["compiled"]["off"] > base.tolerance["forward"]:
            _as_the_default_compiles(steps, base, run)


def _as_the_default_compiles(steps: dict[str, Any], base: Base, run: Callable[[], Values]) -> None:
    """Judge a compiled step that failed or differs by the default backend's own graph."""
    found: dict[str, Any] = {}
    with implementation(base.model, base.default):
        _one(found, "compiled", run, base.values["forward"])
    default, mine = found["compiled"], steps["compiled"]
    if "error" in default:
        base.failed["compiled"] = default["error"]
        del steps["compiled"]
    elif "error" not in mine and default["off"] > base.tolerance["forward"]:
        base.failed["compiled"] = f"its graph is off by {default['off']:.2g} from its eager run ({default['where']})"
        if steps["forward"]["off"] > base.tolerance["forward"]:  # Star: no graph with its numbers to compare with
            del steps["compiled"]
            return
        off = difference(default["values"], mine["values"])
        steps["compiled"] = {**mine, "off": off.relative, "where": off.where}


def _one(steps: dict[str, Any], step: str, run: Callable[[], Values], expected: Values) -> None:
    try:
        values = run()
    except (KeyboardInterrupt, MemoryError):
        raise
    except Exception as error:
        steps[step] = {"error": text_of(error)}
        return
    off = difference(expected, values)
    steps[step] = {"off": off.relative, "where": off.where, "values": values}


def _star(found: dict[str, Any], base: Base, options: dict[str, Any]) -> None:
    """Star against what it must not change: the past, a full row beside a padded one, and the mask it stands for."""
    steps, model, inputs = found["steps"], base.model, base.inputs
    if "values" not in steps["forward"] or "input_ids" not in inputs.plain:
        return
    star = steps["forward"]["values"]
    if found["plain"]:
        found["leak"] = leaks(model, inputs.plain, star)
    if inputs.padded is not None and "values" in steps.get("padded", {}):
        full = runs.forward(model, inputs.padded)
        shared = {n: v[:1] for n, v in star.items() if v.ndim >= 3 and v.shape[0] > 1}
        found["full_row"] = difference(shared, {n: full[n][:1] for n in shared if n in full}).relative
    if found["plain"]:
        mask = star_mask(inputs.plain["input_ids"], **options)
        try:
            with implementation(model, base.default):
                dense = runs.forward(model, {**inputs.plain, "attention_mask": mask})
        except Exception:  # this family makes no use of a mask of four dimensions
            return
        off = difference(dense, star).relative
        if off != float("inf"):  # a model that sees its inputs' shape in the mask gives other shapes
            found["oracle"] = off


def _forced(model: Any, base: Base, name: str) -> str:
    """What would happen without the refusal: a needless one is worth knowing."""
    try:
        with implementation(model, name), runs.counted(name) as calls:
            off = difference(base.values["forward"], runs.forward(model, base.inputs.plain)).relative
    except Exception as error:
        return f"raises {text_of(error)}"
    if not calls:
        return "never called"
    return "equal" if off <= base.tolerance["forward"] else f"off by {off:.2g}"
