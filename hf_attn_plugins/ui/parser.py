"""The argument parser of `hf-attn`: argparse, whose errors also say what was probably meant."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from hf_attn_plugins.ui.suggest import nearest


class Formatter(argparse.HelpFormatter):
    """Help that names the default of every option which has one and does not speak of it itself."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.help or ""
        value = action.default
        silent = value is None or isinstance(value, (bool, list)) or value in ("", argparse.SUPPRESS)
        if silent or "default" in said or not action.option_strings:
            return action.help
        return f"{said} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that shows defaults, and suggests what was meant by a misspelt option or choice."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        options.setdefault("formatter_class", Formatter)
        super().__init__(*arguments, **options)

    def error(self, message: str) -> NoReturn:
        """Print usage and the message with its suggestions on stderr, and exit with status 2."""
        super().error("; ".join([message, *self._suggestions(message)]))

    def _suggestions(self, message: str) -> Iterator[str]:
        if message.startswith("unrecognized arguments: "):
            for word in message.removeprefix("unrecognized arguments: ").split():
                flag = word.partition("=")[0]
                meant = nearest(flag, options_of(self)) if flag.startswith("-") else None
                if meant is not None:
                    yield f"did you mean {meant}?"
            return
        wrong = re.search(r"invalid choice: '([^']*)' \((?:maybe.*)?choose from (.*)\)", message)
        if wrong is not None:
            meant = nearest(wrong[1], re.findall(r"[\w.:-]+", wrong[2]))
            if meant is not None:
                yield f"did you mean {meant}?"


def options_of(parser: argparse.ArgumentParser) -> list[str]:
    """Every option of a parser and of its sub-commands, by its written forms."""
    found = list(parser._option_string_actions)  # argparse has no public list of what was added
    for name in subcommands_of(parser):
        found += options_of(subcommands_of(parser)[name])
    return found


def subcommands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The parsers of a parser's sub-commands, by name."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}
