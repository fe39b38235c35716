"""Transformers' attention call turned into ours: arguments adapted, the method asked, the result laid out.

`forward` is the whole way: `call_arguments` validates and puts everything that hides keys into one mask, `run` asks
the method (through `planned_op` while a graph is traced) and tells an open trace what was decided.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.core.decision import CallFacts, Decision
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.options import Options
from hf_attn_plugins.core.partial import Partial, with_sinks
from hf_attn_plugins.core.warn import warn_once
from hf_attn_plugins.hf.calls import call_arguments, recorder
from hf_attn_plugins.hf.calls.planned_op import planned
from hf_attn_plugins.hf.models import families
from hf_attn_plugins.plugins import EXACT, PLUGINS, Plugin, plugin

TILES = "hf_attn_plugins.tiled.decide:decide"


@dataclass(frozen=True)
class Method:
    """A row of the table, resolved: importing by name is something torch.compile cannot trace."""

    name: str
    short: str
    exact: bool
    attention: Callable[..., Partial]
    options_type: type[Options]
    defaults: Options
    decide: Callable[..., Decision]
    has_own_plan: bool

    @classmethod
    def of(cls, row: Plugin) -> Method:
        """The functions of a row."""
        own = row.decide != TILES
        kind = row.options_type()
        return cls(row.name, row.short, row.exact, row.attention(), kind, kind(), row.decision(), own)

    def options(self, config: Any) -> Any:
        """This method's options as stored in a config, defaults where it holds none."""
        stored = families.stored_options(config, self.name)
        if not stored:
            return self.defaults
        return self.options_type.of(stored, f"hf_attn_plugins[{self.name!r}] in the config ({type(config).__name__})")

    def decision(self, call: CallFacts, options: Any) -> Decision:
        """What this method does with a call; a method without a `decide` of its own is named by its short name."""
        made = self.decide(call, options)
        return made if self.has_own_plan or made.method != "tiled" else made.of_call(method=self.short)


def attention_function(row: Plugin) -> Callable[..., tuple[Tensor, None]]:
    """The function that Transformers calls for `attn_implementation=row.name`; see `forward` for its arguments."""
    method, exact = Method.of(row), Method.of(plugin(EXACT))

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        return forward(method, exact, module, query, key, value, attention_mask, **kwargs)

    attention.__name__ = attention.__qualname__ = row.name
    return attention


def forward(
    method: Method,
    exact: Method,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    seq_idx: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One attention call of a Transformers model through a plugin.

    Args:
        method, exact: the plugin, and what computes the calls that are not causal self-attention.
        query: (B, Hq, Q, D); key, value: (B, Hkv, K, D or Dv), with everything the cache holds.
        attention_mask: what our mask function made, or a user's (B, 1 or H, Q, K) bool or float tensor.
        s_aux, sinks: learned sink logits (Hq,), which enter the softmax's denominator once.
        position_bias: float (1 or B, Hq, Q, K), added to the scaled scores.
        cu_seq_lens_q, seq_idx: boundaries (n + 1,) or segment ids (B, Q) of packed sequences.

    Returns:
        ((B, Q, Hq, Dv) contiguous, None): attention weights are never formed.

    Raises:
        NotImplementedError: a keyword that would change the result and that the plugin cannot honour.
        ValueError: a mask of another dtype or shape.
    """
    call_arguments.refuse_unknown(method.name, module, kwargs)
    if kwargs.get("output_attentions") and not torch.compiler.is_compiling():
        warn_once(
            f"{method.name} never forms attention weights: output_attentions gives (). Use 'eager' to inspect them."
        )
    query, key, value = call_arguments.one_dtype(query, key, value)
    seen = call_arguments.seen_by(module, query, key, attention_mask, is_causal, sliding_window)
    if cu_seq_lens_q is not None or seq_idx is not None:
        seen = call_arguments.packed(seen, query, key, cu_seq_lens_q, seq_idx)
    if position_bias is not None:
        seen = call_arguments.biased(seen, position_bias)
    sink = call_arguments.sink_of(s_aux, sinks, query, method.name)
    if not seen.is_causal and not seen.recognised and not method.exact and query.shape[2] > 1:
        warn_once(
            f"{method.name}: the attention mask is a tensor, which no plan can be read from; these calls run dense. "
            "Pass a 2-d padding mask instead, or none."
        )
    # Bidirectional encoders, cross-attention and vision towers take the exact path under every name.
    chosen = method if seen.is_causal else exact
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    partial = run(method, chosen, module, query, key, value, seen, scale, softcap, dropout)
    return with_sinks(partial, sink).out.transpose(1, 2).contiguous(), None


def run(
    method: Method,
    chosen: Method,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: call_arguments.Seen,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> Partial:
    """The method's attention, and a word to the trace that is open on this module, if there is one."""
    config = getattr(module, "config", None)
    trace = recorder.on(module)
    # An exported graph may be for any length.
    hidden = torch.compiler.is_compiling() and (chosen.has_own_plan or torch.compiler.is_exporting())
    if hidden and chosen.name in PLUGINS:
        stored = families.stored_options(config, chosen.name)
        layer = _layer(module, chosen.options_type.by_layer, stored)
        tag = recorder.tag(trace, module, seen)
        return planned(
            chosen.name, stored, layer, query, key, value, seen.mask, tag, scale=scale, softcap=softcap, dropout=dropout
        )
    options = chosen.options(config)
    if options.by_layer:
        options = options.for_layer(getattr(module, "layer_idx", None))
    if trace is not None:
        facts = CallFacts(
            query.shape[2], key.shape[2], query.shape[0], _start(seen.mask, query, key), seen.mask,
            torch.compiler.is_compiling(), key.shape[1],
        )  # fmt: skip
        recorder.note(trace, module, method, chosen, facts, options, seen)
    if query.is_meta:
        return Partial.unfilled(query, value.shape[-1])
    return chosen.attention(
        query, key, value, seen.mask, scale=scale, softcap=softcap, dropout=dropout, options=options
    )


def _layer(module: nn.Module, by_layer: tuple[str, ...], stored: Mapping[str, Any]) -> int | None:
    """A module's layer where options differ by layer: a compiled graph that reads it serves this layer only."""
    return getattr(module, "layer_idx", None) if any(name in stored for name in by_layer) else None


def _start(mask: Mask, query: Tensor, key: Tensor) -> int | None:
    if isinstance(mask.offset, Tensor):
        return None if torch.compiler.is_compiling() else int(mask.offset)
    return mask.start(query.shape[2], key.shape[2])
