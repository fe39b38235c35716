"""One family: a tiny model under its default backend, then under every plugin; what differs, raises or is refused."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from hf_attn_plugins.hf import compat
from hf_attn_plugins.hf.check import check
from hf_attn_plugins.hf.configs import configs_of
from hf_attn_plugins.hf.configure import use
from hf_attn_plugins.hf.scan import runs, weights
from hf_attn_plugins.hf.scan.families import Family, config_class, model_class
from hf_attn_plugins.hf.scan.inputs import Inputs, inputs_for
from hf_attn_plugins.hf.scan.oracle import leaks, star_mask
from hf_attn_plugins.hf.scan.runs import Values, difference
from hf_attn_plugins.hf.scan.shrink import LENGTH, shrunk

# Sizes at which a prompt of 40 tokens takes every branch: several blocks, an anchor, a query, several workers.
OPTIONS: dict[str, dict[str, Any]] = {
    "tiled_attention": {},
    "star_attention": {"block_size": 8, "anchor_size": 4, "query_size": 6},
    "cqs_attention": {"workers": 3, "min_length": 1},
}
STEPS = ("forward", "padded", "generate", "gradient", "compiled")
ROUNDING = 1e-5  # relative: some hundred additions in float32 in another order
SLACK = 20  # times what one rounding step in every weight changes
TOO_NOISY = 2e-3  # beyond this a wrong mask could pass for rounding: gentler weights are drawn


@dataclass
class Base:
    """What the default backend gives: values and tolerance of every step that it can run."""

    model: Any
    default: str
    inputs: Inputs
    level: str
    values: dict[str, Values]
    tolerance: dict[str, float]
    failed: dict[str, str]


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


def baseline(model: Any, steps: Collection[str]) -> Base:
    """Run the default backend under the sharpest weights that keep the numbers finite and well conditioned.

    Raises:
        ValueError: no inputs run.
    """
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    inputs = None
    for level in weights.LEVELS:
        model.load_state_dict(before)
        weights.randomize(model, level)
        if inputs is None:
            inputs, _ = inputs_for(model, lambda arguments: _some(runs.forward(model, arguments)))
        try:
            values = runs.forward(model, inputs.plain)
        except Exception:  # weights that no branch of the model was made for
            continue
        finite = values and all(bool(torch.isfinite(v).any()) for v in values.values())
        noise = _noise(model, functools.partial(runs.forward, model, inputs.plain), values) if finite else float("inf")
        if noise < TOO_NOISY or level == "plain":
            break
    assert inputs is not None  # the first level sets it or raises
    base = Base(model, default_of(model), inputs, level, {"forward": values}, {"forward": ROUNDING + SLACK * noise}, {})
    for step in steps:
        if step in ("forward", "compiled"):
            continue
        run = _run(step, model, inputs)
        if run is None:
            continue
        try:
            base.values[step] = run()
            base.tolerance[step] = ROUNDING + SLACK * _noise(model, run, base.values[step])
        except (KeyboardInterrupt, MemoryError):
            raise
        except Exception as error:
            base.failed[step] = text_of(error)
    return base


def _some(values: Values) -> Values:
    if not values:
        raise ValueError("the output holds no floating-point tensor")
    return values


def _noise(model: Any, run: Callable[[], Values], values: Values) -> float:
    """What one rounding step in every weight changes, or another run with the same weights."""
    again = difference(values, run()).relative
    with weights.perturbed(model):
        return max(again, difference(values, run()).relative)


def _run(step: str, model: Any, inputs: Inputs) -> Callable[[], Values] | None:
    """The function of one step, or None where the model has no such step."""
    if step == "padded":
        return (lambda: runs.padded(model, inputs)) if inputs.padded is not None else None
    if step == "generate":
        arguments = {k: v for k, v in (inputs.padded or inputs.plain).items() if k != "decoder_input_ids"}
        can = getattr(model, "can_generate", lambda: False)()
        return (lambda: runs.generate(model, arguments)) if can and arguments else None
    return {
        "forward": lambda: runs.forward(model, inputs.plain),
        "gradient": lambda: runs.gradient(model, inputs.plain),
        "compiled": lambda: runs.compiled(model, inputs.plain),
    }[step]


def sensitivity(base: Base) -> float | None:
    """How far scores that are a tenth too large move the output, in tolerances: a small number tests nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    model, name = base.model, "scan_blunt"
    default = base.default

    def blunt(module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **rest: Any) -> Any:
        function: Any = AttentionInterface._global_mapping.get(default)
        if function is None:
            function = sys.modules[type(module).__module__].eager_attention_forward
        return function(module, query * 1.1, key, value, attention_mask, **rest)

    AttentionInterface.register(name, blunt)
    mask: Any = AttentionMaskInterface._global_mapping[default]
    AttentionMaskInterface.register(name, mask)
    try:
        with _implementation(model, name):
            moved = difference(base.values["forward"], runs.forward(model, base.inputs.plain)).relative
        return round(moved / base.tolerance["forward"], 2)
    except Exception:
        return None
    finally:
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


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
    found.update(_verdict(found, base, name))
    if found["verdict"] == "WRONG" and base.default != "eager" and _equals_eager(base, name, options):
        found["verdict"] = "as eager"
        found["why"] = f"{base.default} and eager differ in this family, and the plugin gives eager's numbers"
    return found


def _equals_eager(base: Base, name: str, options: dict[str, Any]) -> bool:
    """Whether Transformers' own backends disagree, and the plugin agrees with the one that is written out."""
    try:
        with _implementation(base.model, "eager"):
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
            run = _run(step, base.model, base.inputs) if step in base.values else None
            if run is not None:
                _one(found["steps"], step, run, base.values[step])
            if step == "forward":
                found["calls"], found["causal"] = len(calls), sum(call["causal"] for call in calls)
                found["unrecognised"] = sum(not call["recognised"] for call in calls)
                found["plain"] = bool(calls) and all(c["plain"] and c["rows"] == c["keys"] == LENGTH for c in calls)
    if compiled:  # the recorder would break the graph
        steps = found["steps"]
        eager = steps.get("forward", {}).get("values", base.values["forward"])
        run = _run("compiled", base.model, base.inputs)
        assert run is not None
        _one(steps, "compiled", run, eager)
        if "error" in steps["compiled"]:
            with _implementation(base.model, base.default):
                other: dict[str, Any] = {}
                _one(other, "compiled", run, base.values["forward"])
            if "error" in other["compiled"]:
                base.failed["compiled"] = other["compiled"]["error"]
                del steps["compiled"]


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
            with _implementation(model, base.default):
                dense = runs.forward(model, {**inputs.plain, "attention_mask": mask})
        except Exception:  # this family makes no use of a mask of four dimensions
            return
        off = difference(dense, star).relative
        if off != float("inf"):  # a model that sees its inputs' shape in the mask gives other shapes
            found["oracle"] = off


def _verdict(found: dict[str, Any], base: Base, name: str) -> dict[str, Any]:
    steps = found["steps"]
    for step in steps.values():
        step.pop("values", None)
    errors = {step: value["error"] for step, value in steps.items() if "error" in value}
    if errors:
        return {
            "verdict": "RAISED",
            "why": "; ".join(
                f"{', '.join(s for s in errors if errors[s] == e)}: {e}" for e in dict.fromkeys(errors.values())
            ),
        }
    star = name == "star_attention" and found["causal"]
    tolerance = {**base.tolerance, "compiled": base.tolerance["forward"]}
    compared = {s: v for s, v in steps.items() if not star or s == "compiled"}
    wrong = {s: v for s, v in compared.items() if v["off"] > tolerance[s]}
    if wrong:
        why = "; ".join(
            f"{s} off by {v['off']:.2g} ({v['where']}), allowed {tolerance[s]:.2g}" for s, v in wrong.items()
        )
        return {"verdict": "WRONG", "why": why}
    if not found["calls"]:
        return {"verdict": "never called", "why": "the forward makes no call"}
    if not star:
        passed = name != "tiled_attention" and not found["causal"]
        return {"verdict": "passed through" if passed else "exact", "why": "not causal" if passed else ""}
    allowed = tolerance["forward"] + 1e-4
    for key, what in (
        ("leak", "later tokens change earlier outputs by"),
        ("full_row", "a padded neighbour changes a full row by"),
        ("oracle", "differs from the same mask under the default backend by"),
    ):
        if found.get(key) is not None and found[key] > allowed:
            return {"verdict": "WRONG", "why": f"{what} {found[key]:.2g}, allowed {allowed:.2g}"}
    if steps["forward"]["off"] <= tolerance["forward"]:
        return {"verdict": "dense", "why": "the output is that of full attention"}
    return {"verdict": "star used", "why": "equals its mask" if found.get("oracle") is not None else ""}


def _forced(model: Any, base: Base, name: str) -> str:
    """What would happen without the refusal: a needless one is worth knowing."""
    try:
        with _implementation(model, name), runs.counted(name) as calls:
            off = difference(base.values["forward"], runs.forward(model, base.inputs.plain)).relative
    except Exception as error:
        return f"raises {text_of(error)}"
    if not calls:
        return "never called"
    return "equal" if off <= base.tolerance["forward"] else f"off by {off:.2g}"


def default_of(model: Any) -> str:
    """The backend that Transformers chose."""
    return getattr(model.config, "_attn_implementation", None) or "eager"


class _implementation:
    """Another attention implementation for a while, without check."""

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name

    def __enter__(self) -> None:
        self.before = [(c, compat.implementation_of(c)) for c in configs_of(self.model)]
        self.model.set_attn_implementation(self.name)

    def __exit__(self, *_: object) -> None:
        for config, name in self.before:
            compat.set_implementation(config, name)


def text_of(error: BaseException | None) -> str:
    """An error as one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
