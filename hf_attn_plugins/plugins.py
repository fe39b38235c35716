"""The plugin table and nothing else: registration, command line, README, tests, ranks and benchmarks read it.

A row names everything that belongs to a method as "module:name", so the table imports no method.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_attn_plugins.core.options import Options


@dataclass(frozen=True)
class Plugin:
    """One attention implementation that Transformers can be asked for by name.

    Attributes:
        name: what goes into `attn_implementation=`.
        summary: one line on what it does.
        exact: whether its outputs equal the default backend's up to rounding.
        source: where the method comes from.
        entry: the method's function (query, key, value, mask, *, scale, softcap, dropout, options) -> Partial, as
            "module:name" or the function itself.
        options: the dataclass that validates its options, as "module:name" or the class itself.
        decide: function (CallFacts, options) -> Decision that says what the method does with a call.
        command: module of `hf-attn plan`, or None.
        bench: module of `hf-attn bench`, or None.
        ranks: class that runs the method on several ranks, as "module:name"; None when it runs in one process only.
    """

    name: str
    summary: str
    exact: bool
    source: str
    entry: str | Callable[..., Any]
    options: str | type[Options]
    decide: str | Callable[..., Any] = "hf_attn_plugins.tiled.decide:decide"
    command: str | None = None
    bench: str | None = None
    ranks: str | None = None

    @property
    def short(self) -> str:
        """The name of the method on the command line: "star" for "star_attention"."""
        return self.name.removesuffix("_attention")

    def attention(self) -> Callable[..., Any]:
        """The method's function."""
        return resolve(self.entry)

    def decision(self) -> Callable[..., Any]:
        """The function that says what the method does with a call."""
        return resolve(self.decide)

    def options_type(self) -> type[Options]:
        """The dataclass that validates this plugin's options."""
        return resolve(self.options)

    def as_dict(self) -> dict[str, Any]:
        """The row as JSON-ready values."""
        row = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {name: f"{x.__module__}:{x.__qualname__}" if callable(x) else x for name, x in row.items()}


class PluginTable(list[Plugin]):
    """Rows of the plugin table: a list that prints as a table."""

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        heads = ["attn_implementation=", "exact", "what it does", "options"]
        rows = [
            [row.name, "yes" if row.exact else "no", row.summary, ", ".join(row.options_type().names())] for row in self
        ]
        return heads, rows

    def __str__(self) -> str:
        from hf_attn_plugins.ui.shown import text_table

        heads, rows = self._cells()
        return "\n".join(text_table(heads, rows, words=len(heads)))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from hf_attn_plugins.ui.shown import html_table

        return html_table("Attentions of hf_attn_plugins", *self._cells(), words=4)


PLUGINS: dict[str, Plugin] = {
    plugin.name: plugin
    for plugin in (
        Plugin(
            name="tiled_attention",
            summary="FlashAttention-style tiles: never holds a score matrix; bfloat16 products on CPUs",
            exact=True,
            source="FlashAttention, arXiv 2205.14135 and 2307.08691",
            entry="hf_attn_plugins.tiled.entry:attention",
            options="hf_attn_plugins.tiled.options:TiledOptions",
            command="hf_attn_plugins.tiled.command",
            bench="hf_attn_plugins.commands.bench.tiled",
            ranks="hf_attn_plugins.parallel.dense:Dense",
        ),
        Plugin(
            name="star_attention",
            summary="Star Attention: blocks and an anchor for the context, everything for query and answer",
            exact=False,
            source="Star Attention, arXiv 2411.17116",
            entry="hf_attn_plugins.star.entry:attention",
            options="hf_attn_plugins.star.options:StarOptions",
            decide="hf_attn_plugins.star.decide:decide",
            command="hf_attn_plugins.star.command",
            bench="hf_attn_plugins.commands.bench.star.command",
            ranks="hf_attn_plugins.parallel.star:Star",
        ),
        Plugin(
            name="cqs_attention",
            summary="independent workers, each pair of token groups computed by exactly one; bounded memory per worker",
            exact=True,
            source="CQS-Attention, IEEE Access 13 (2025) 35527",
            entry="hf_attn_plugins.cqs.entry:attention",
            options="hf_attn_plugins.cqs.options:CQSOptions",
            decide="hf_attn_plugins.cqs.decide:decide",
            command="hf_attn_plugins.cqs.command",
            bench="hf_attn_plugins.commands.bench.cqs",
            ranks="hf_attn_plugins.parallel.cqs:CQS",
        ),
    )
}
EXACT = "tiled_attention"  # what computes every call that a method's plan is not for


def plugin(name: str) -> Plugin:
    """The plugin called `name`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    if name not in PLUGINS:
        from hf_attn_plugins.ui.suggest import did_you_mean

        raise ValueError(
            f"{name!r} is no plugin of hf_attn_plugins{did_you_mean(name, PLUGINS)}: choose one of "
            f"{', '.join(PLUGINS)}."
        )
    return PLUGINS[name]


def resolve(named: Any) -> Any:
    """What "module:name" names, imported now; anything but a string is returned as it is."""
    if not isinstance(named, str):
        return named
    module, _, name = named.partition(":")
    return getattr(importlib.import_module(module), name)
