"""What a tiny model gives under its default backend: values and tolerance of every step that it can run."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch

from hf_attn_plugins.hf.compat import forget_attention, implementation_of, registered_attention, registered_mask
from hf_attn_plugins.hf.scan import runs
from hf_attn_plugins.hf.scan.runs import Values, difference
from hf_attn_plugins.hf.scan.switch import implementation
from hf_attn_plugins.hf.scan.tiny import weights
from hf_attn_plugins.hf.scan.tiny.inputs import Inputs, inputs_for

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
        run = step_of(step, model, inputs)
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


def step_of(step: str, model: Any, inputs: Inputs) -> Callable[[], Values] | None:
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
        function: Any = registered_attention(default)
        if function is None:
            function = sys.modules[type(module).__module__].eager_attention_forward
        return function(module, query * 1.1, key, value, attention_mask, **rest)

    AttentionInterface.register(name, blunt)
    mask: Any = registered_mask(default)
    AttentionMaskInterface.register(name, mask)
    try:
        with implementation(model, name):
            moved = difference(base.values["forward"], runs.forward(model, base.inputs.plain)).relative
        return round(moved / base.tolerance["forward"], 2)
    except Exception:
        return None
    finally:
        forget_attention(name)


def default_of(model: Any) -> str:
    """The backend that Transformers chose."""
    return implementation_of(model.config) or "eager"


def text_of(error: BaseException | None) -> str:
    """An error as one line of bounded length."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:240]}"
