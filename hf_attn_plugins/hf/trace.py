"""`trace`: what really ran, per attention call."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch import nn

from hf_attn_plugins.core.decision import Decision
from hf_attn_plugins.hf.calls import recorder
from hf_attn_plugins.hf.models.attention_modules import attention_modules
from hf_attn_plugins.ui.shown import Shown


class Trace(Shown):
    """What a `trace` has seen.

    Attributes:
        calls: one `Decision` per attention call, in order.
    """

    def __init__(self, calls: list[Decision]) -> None:
        self.calls = calls

    @property
    def methods(self) -> Counter[str]:
        """How often each method ran: "star", "dense", "cqs", "tiled", "decode", or another plugin's short name."""
        return Counter(call.method for call in self.calls)

    @property
    def share(self) -> float | None:
        """Attended over causal pairs of all prompts; None where no causal prompt was seen."""
        causal = sum(call.causal for call in self.calls)
        return sum(call.attended for call in self.calls) / causal if causal else None

    @property
    def layers(self) -> dict[int | None, Counter[str]]:
        """The methods per layer."""
        found: dict[int | None, Counter[str]] = {}
        for call in self.calls:
            found.setdefault(call.layer, Counter())[call.method] += 1
        return found

    def plan(self) -> str:
        """What ran for the longest prompt, as one line: "star: blocks 4, ...; 39% of the causal pairs"."""
        prompts = [call for call in self.calls if call.causal]
        if not prompts:
            return "no causal prompt was seen"
        longest = max(call.rows for call in prompts)
        calls = [call for call in prompts if call.rows == longest]
        texts = Counter(call.text() for call in calls)
        parts = [f"{text} ({n / len(calls):.0%} of the calls)" if len(texts) > 1 else text for text, n in texts.items()]
        share = sum(call.attended for call in calls) / sum(call.causal for call in calls)
        return "; ".join(parts) + ("" if share == 1 else f"; {share:.0%} of the causal pairs")

    def __str__(self) -> str:
        if not self.calls:
            return "no attention call was seen: run the model inside `with hap.trace(model) as seen:`"
        rows: dict[tuple[Any, ...], list[Decision]] = {}
        for call in self.calls:
            rows.setdefault((call.text(), call.rows, call.keys, call.mask), []).append(call)
        lines = [f"{'calls':>6}  {'layers':<10} {'queries x keys':<16} {'mask':<22} what ran"]
        for (text, queries, keys, mask), calls in rows.items():
            layers = _span(sorted({call.layer for call in calls if call.layer is not None}))
            shape, names = f"{queries} x {keys}", " and ".join(mask) or "a tensor"
            lines.append(f"{len(calls):>6}  {layers:<10} {shape:<16} {names:<22} {text}")
        share = self.share
        lines.append("share of the causal pairs: " + ("no causal prompt was seen" if share is None else f"{share:.3f}"))
        return "\n".join(lines)

    __repr__ = __str__


def _span(layers: list[int]) -> str:
    if not layers:
        return "-"
    whole = layers == list(range(layers[0], layers[-1] + 1))
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}" if whole else f"{len(layers)} of them"


@contextlib.contextmanager
def trace(model: nn.Module) -> Iterator[Trace]:
    """Count what runs in a model's attention modules: `with hap.trace(model) as seen: model(...)`.

    Cheap enough to leave on: one record per attention call. A compiled model makes new graphs while a trace is open.
    Attention under another name than a plugin's ("sdpa", "eager") is not seen. Traces can be nested on one model; the
    innermost counts.

    Yields:
        `Trace` with `calls`, `methods`, `share`, and a table as its `str`.
    """
    with recorder.opened(attention_modules(model)) as calls:
        yield Trace(calls)
