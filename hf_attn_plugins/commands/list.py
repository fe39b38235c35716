"""`hf-attn list`: the plugin table, for the terminal, as Markdown (the README's) or as JSON; and what this CPU is."""

from __future__ import annotations

import argparse
import json

from hf_attn_plugins.commands import this_cpu
from hf_attn_plugins.plugins import PLUGINS

WIDE = 110  # columns of a terminal from which on the table is not cut into narrow columns


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print the table as JSON")
    group.add_argument("--markdown", action="store_true", help="print the table as Markdown")


def run(arguments: argparse.Namespace) -> None:
    """Print the table, in a narrow terminal as one block of lines for each plugin, and a sentence on this CPU."""
    if arguments.json:
        print(json.dumps([plugin.as_dict() for plugin in PLUGINS.values()], indent=2))
    elif arguments.markdown:
        print(markdown())
    else:
        _print_table()
        found = this_cpu.here()
        if found:
            print(f"\n{found}")


def _print_table() -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    if console.width < WIDE:
        print(blocks())
        return
    table = Table(Column("name", no_wrap=True), "what it does", "exact", Column("options", overflow="fold"), "source")
    for row in _rows():
        table.add_row(*row)
    console.print(table)


def markdown() -> str:
    """The table as it stands in the README."""
    head = ["| `attn_implementation=` | what it does | exact? | options | source |", "|---|---|---|---|---|"]
    return "\n".join(head + [f"| `{row[0]}` | " + " | ".join(row[1:]) + " |" for row in _rows()])


def blocks() -> str:
    """The table as one paragraph for each plugin."""
    heads = ("", "does", "exact", "options", "source")
    return "\n\n".join(
        "\n".join([row[0], *(f"  {head:<8} {text}" for head, text in zip(heads[1:], row[1:], strict=True))])
        for row in _rows()
    )


def _rows() -> list[list[str]]:
    return [
        [
            plugin.name,
            plugin.summary,
            "yes" if plugin.exact else "approximate, by design",
            ", ".join(plugin.options_type().names()),
            plugin.source,
        ]
        for plugin in PLUGINS.values()
    ]
