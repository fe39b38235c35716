"""`check`: what a plugin will do in every attention module of a model, before anything is run."""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_attn_plugins.hf.unwrap import unwrapped
from hf_attn_plugins.registry import plugin

SEMANTICS_REFUSED = ("block_indices=", "indices=")


@dataclass(frozen=True)
class Verdict:
    """What happens in all modules of one class: "honoured", "passed through" (exact tiles) or "refused", and why."""

    module_class: str
    count: int
    verdict: str
    reason: str


@dataclass(frozen=True)
class CheckReport:
    """The verdicts of one model, printable and iterable."""

    plugin: str
    model_class: str
    verdicts: tuple[Verdict, ...]

    @property
    def ok(self) -> bool:
        """True when some module is reached by the plugin and none is refused."""
        return bool(self.verdicts) and all(v.verdict != "refused" for v in self.verdicts)

    def raise_if_refused(self) -> None:
        """Raise ValueError with the reasons unless `ok`."""
        if not self.ok:
            reasons = [f"{v.module_class} x {v.count}: {v.reason}" for v in self.verdicts if v.verdict == "refused"]
            why = "; ".join(reasons) or "no attention module was found"
            raise ValueError(f"{self.plugin} cannot be used with {self.model_class}: {why}.")

    def __str__(self) -> str:
        lines = [f"{self.plugin} in {self.model_class}:"]
        lines += [f"  {v.verdict:<14} {v.module_class} x {v.count}: {v.reason}" for v in self.verdicts]
        return "\n".join(lines)


def check(model: nn.Module, name: str) -> CheckReport:
    """Walk every attention module of a model and say whether plugin `name` is honoured, passed through or refused.

    Args:
        model: any `transformers.PreTrainedModel`, on any device, the meta device included.

    Raises:
        ValueError: unknown plugin.
    """
    plugin(name)
    model = unwrapped(model)
    found: Counter[tuple[str, str, str]] = Counter()
    for module in model.modules():
        result = _verdict(module, name)
        if result is not None:
            verdict, reason = result
            found[(type(module).__name__, verdict, reason)] += 1
    verdicts = tuple(Verdict(cls, count, verdict, reason) for (cls, verdict, reason), count in found.items())
    return CheckReport(name, type(model).__name__, verdicts)


def _verdict(module: nn.Module, name: str) -> tuple[str, str] | None:
    can_set = getattr(type(module), "_can_set_attn_implementation", None)
    if can_set is not None:  # a PreTrainedModel
        if not can_set() and _has_attention(module):
            return "refused", "the model's code does not support switching its attention"
        return None
    if not _is_attention(module):
        return None
    kind: Any = type(module)
    source = _source(kind)
    if "ALL_ATTENTION_FUNCTIONS" not in source and "attention_interface" not in source:
        return "refused", "computes attention itself and never asks the registry"
    sparse = next((word[:-1] for word in SEMANTICS_REFUSED if word in source), None)
    if sparse is not None:
        return "refused", f"passes `{sparse}`: sparse attention chosen by the model itself"
    if name == "tiled_attention":
        return "honoured", "exact"
    if getattr(module, "is_causal", False):
        return "honoured", "causal self-attention"
    return "passed through", "not causal: the exact tiled path"


def _is_attention(module: nn.Module) -> bool:
    """A module that projects and attends itself, rather than one that wraps such a module."""
    if "attention" not in type(module).__name__.lower():
        return False
    kind: Any = type(module)
    source = _source(kind)
    if "ALL_ATTENTION_FUNCTIONS" in source or "attention_interface" in source:
        return True
    return "softmax" in source or "scaled_dot_product_attention" in source


def _has_attention(model: nn.Module) -> bool:
    return any(_is_attention(module) for module in model.modules())


@functools.cache
def _source(cls: Any) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):
        return ""
