"""`check`: what a plugin will do in every attention module of a model, before anything is run.

Sources say which modules ask Transformers' attention registry at all; a dry run of the model's own forward on the meta
device says what the others hand over: masks, sinks, keys of another length.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_attn_plugins.core.decision import Decision
from hf_attn_plugins.hf import compat
from hf_attn_plugins.hf.dry_run import DryRun, dry_run
from hf_attn_plugins.hf.models import families
from hf_attn_plugins.hf.models.attention_modules import (
    asks_registry,
    attention_modules,
    is_attention,
    sparse_keyword,
    takes_mask,
    takes_mask_for_padding,
)
from hf_attn_plugins.hf.models.unwrap import unwrapped
from hf_attn_plugins.plugins import Plugin, plugin
from hf_attn_plugins.ui.shown import Shown


@dataclass(frozen=True)
class Verdict:
    """What happens in all modules of one class, and why.

    Attributes:
        verdict: "honoured", "passed through" (exact tiles), "left as it is" (attends by itself) or "refused".
    """

    module_class: str
    count: int
    verdict: str
    reason: str


@dataclass(frozen=True, repr=False)
class CheckReport(Shown):
    """The verdicts of one model, printable.

    Attributes:
        calls: the attention calls of a prompt of `length` tokens, as `trace` will count them; empty where no length
            was asked for, or where the model cannot run on the meta device.
        notes: what holds for all modules.
    """

    plugin: str
    model_class: str
    verdicts: tuple[Verdict, ...]
    calls: tuple[Decision, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """True when some module is reached by the plugin and none is refused."""
        reached = any(v.verdict in ("honoured", "passed through") for v in self.verdicts)
        return reached and all(v.verdict != "refused" for v in self.verdicts)

    @property
    def methods(self) -> Counter[str]:
        """How often each method will run for a prompt of the asked length."""
        return Counter(call.method for call in self.calls)

    def raise_if_refused(self) -> None:
        """Raise ValueError with the reasons unless `ok`."""
        if not self.ok:
            reasons = [f"{v.module_class} x {v.count}: {v.reason}" for v in self.verdicts if v.verdict == "refused"]
            why = "; ".join(reasons) or "no attention module was found"
            raise ValueError(f"{self.plugin} cannot be used with {self.model_class}: {why}.")

    def __str__(self) -> str:
        lines = [f"{self.plugin} in {self.model_class}:"]
        lines += [f"  {v.verdict:<14} {v.module_class} x {v.count}: {v.reason}" for v in self.verdicts]
        texts = Counter(f"{call.text()} ({call.rows} tokens)" for call in self.calls)
        lines += [f"  will run       {count} x {text}" for text, count in texts.items()]
        lines += [f"  note           {note}" for note in self.notes]
        return "\n".join(lines)

    __repr__ = __str__


def check(model: nn.Module, name: str, length: int | None = None) -> CheckReport:
    """Say for every attention module of a model whether plugin `name` is honoured, passed through or refused.

    Args:
        model: any `transformers.PreTrainedModel`, on any device, the meta device included.
        length: tokens of a prompt; the report then also predicts every call, as `trace` will count them.

    Raises:
        ValueError: unknown plugin.
    """
    row, model = plugin(name), unwrapped(model)
    read = {module: verdict for module in model.modules() if (verdict := _read(module, row)) is not None}
    ran = DryRun(())
    if read and all(verdict != "refused" for verdict, _ in read.values()):
        ran = dry_run(model, name, length)
        read |= _observed(ran, row, read)
    counted = Counter((type(module).__name__, *verdict) for module, verdict in read.items())
    verdicts = tuple(Verdict(cls, count, verdict, reason) for (cls, verdict, reason), count in counted.items())
    calls = tuple(decision for _, decision in ran.calls) if length is not None and ran.unfinished is None else ()
    return CheckReport(name, type(model).__name__, verdicts, calls, tuple(_notes(model, row, ran, length)))


def _read(module: nn.Module, row: Plugin) -> tuple[str, str] | None:
    """The verdict that a module's source allows; None for what is no attention."""
    can_switch = compat.can_switch_attention(module)
    if can_switch is not None:  # a PreTrainedModel
        if not can_switch and attention_modules(module):
            return "refused", f"the model's code does not support switching its attention; {_use(module)}"
        return None
    if takes_mask_for_padding(module):
        return "refused", f"routes experts by the attention mask, read as a padding mask; {_use(module)}"
    if not is_attention(module):
        return None
    if not asks_registry(module):
        if not takes_mask(module):
            return "left as it is", "attends by itself, no mask of the model's reaches it"
        return "refused", f"computes attention itself and never asks the registry; {_use(module)}"
    sparse = sparse_keyword(module)
    if sparse is not None:
        return "refused", f"passes `{sparse}`: sparse attention chosen by the model itself; {_use(module)}"
    if row.exact:
        return "honoured", "exact"
    if getattr(module, "is_causal", False):
        return "honoured", "causal self-attention"
    return "passed through", "not causal: the exact tiled path"


def _observed(ran: DryRun, row: Plugin, read: dict[nn.Module, tuple[str, str]]) -> dict[nn.Module, tuple[str, str]]:
    """Verdicts that the dry run corrects."""
    better: dict[nn.Module, tuple[str, str]] = {}
    for module, decision in ran.calls:
        if module in read and not row.exact and read[module][0] != "left as it is":
            if decision.is_causal:
                better[module] = ("honoured", "causal self-attention")
            elif better.get(module, ("",))[0] != "honoured":
                better[module] = ("passed through", "not causal: the exact tiled path")
    if ran.refusal is not None:
        seen = {module for module, _ in ran.calls}
        culprit = next((m for m in read if m not in seen and read[m][0] != "left as it is"), next(iter(read)))
        better |= {m: ("refused", ran.refusal.rstrip(".")) for m in read if type(m) is type(culprit)}
    return better


def _notes(model: nn.Module, row: Plugin, ran: DryRun, length: int | None) -> list[str]:
    notes = []
    if ran.unfinished is not None and length is not None:
        notes.append(f"the calls cannot be predicted: the forward does not run on the meta device ({ran.unfinished})")
    if not row.exact and any(call.is_causal for _, call in ran.calls):
        example = next(call for _, call in ran.calls if call.is_causal)
        if example.method == "dense" and length is None:
            notes.append(f"short prompts run dense ({example.text()}); ask check(model, name, length=...) for yours")
    return notes


def _use(module: Any) -> str:
    return f'load it with attn_implementation="{families.own_backend(module)}"'
