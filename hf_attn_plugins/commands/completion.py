"""`hf-attn completion bash|zsh|fish`: the shell's completion of commands, options and choices, as a script.

The script holds all words, so that Tab starts no Python. Print it again after an upgrade.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from hf_attn_plugins.commands.table import Entry, Table, commands
from hf_attn_plugins.hf.inputs.arguments import DEMO
from hf_attn_plugins.plugins import PLUGINS
from hf_attn_plugins.ui.parser import subcommands_of

HOW = {
    "bash": 'eval "$(hf-attn completion bash)"   # in ~/.bashrc',
    "zsh": 'eval "$(hf-attn completion zsh)"    # in ~/.zshrc, after compinit',
    "fish": "hf-attn completion fish > ~/.config/fish/completions/hf-attn.fish",
}


@dataclass
class Place:
    """What can stand after a command: sub-commands, options with their choices, words in place of a file.

    `path` is the command's words without "hf-attn", each with a space before it: " plan star".
    """

    path: str
    commands: dict[str, str] = field(default_factory=dict)
    options: dict[str, str] = field(default_factory=dict)
    choices: dict[str, list[str]] = field(default_factory=dict)
    words: list[str] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("shell", choices=list(HOW), help="the shell")
    parser.epilog = "\n".join(["to install it:", *(f"  {line}" for line in HOW.values())])
    parser.formatter_class = argparse.RawDescriptionHelpFormatter


def run(arguments: argparse.Namespace) -> None:
    """Print the script."""
    found = list(places(commands()))
    print({"bash": bash, "zsh": zsh, "fish": fish}[arguments.shell](found), end="")


def places(table: Table, path: str = "") -> Iterator[Place]:
    """Every place of a table of commands, itself first."""
    said = {name: entry.what if isinstance(entry, Entry) else " | ".join(entry) for name, entry in table.items()}
    yield Place(path, said, {} if path else {"--version": "the versions"})
    for name, entry in table.items():
        if isinstance(entry, Entry):
            yield from _of_parser(f"{path} {name}", entry.parser(name))
        else:
            yield from places(entry, f"{path} {name}")


def _of_parser(path: str, parser: argparse.ArgumentParser) -> Iterator[Place]:
    place, below = Place(path), subcommands_of(parser)
    place.commands = {name: one.description or name for name, one in below.items()}
    for action in parser._actions:  # argparse has no public list of what was added
        choices = [str(choice) for choice in action.choices or () if not below or choice not in below]
        for flag in action.option_strings:
            if flag.startswith("--"):
                place.options[flag] = action.help or flag
        if action.dest in ("attn", "baseline"):
            choices = [*PLUGINS, "sdpa", "eager"] if action.dest == "baseline" else list(PLUGINS)
        for flag in action.option_strings:
            if choices:
                place.choices[flag] = choices
        if not action.option_strings and not below:
            place.words += [DEMO] if action.dest in ("model", "source") else choices
    yield place
    for name, one in below.items():
        yield from _of_parser(f"{path} {name}", one)


def bash(found: list[Place]) -> str:
    """The script for bash."""
    return f"""\
# Completion of hf-attn for bash: {HOW["bash"]}
_hf_attn() {{
  local at="" word current="${{COMP_WORDS[COMP_CWORD]}}" last="${{COMP_WORDS[COMP_CWORD-1]}}"
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "$at $word" in
      {_paths(found)}) at="$at $word" ;;
    esac
  done
  local words=""
  case "$at $last" in
{_cases(found, "    ", lambda words: f'words="{words}"')}
    *)
      case "$at" in
{_places(found, "        ", lambda words: f'words="{words}"', '"$current"')}
      esac ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _hf_attn hf-attn
"""


def zsh(found: list[Place]) -> str:
    """The script for zsh."""
    return f"""\
#compdef hf-attn
# Completion of hf-attn for zsh: {HOW["zsh"]}
_hf_attn() {{
  local at="" word current="${{words[CURRENT]}}" last="${{words[CURRENT-1]}}"
  for word in "${{(@)words[2,CURRENT-1]}}"; do
    case "$at $word" in
      {_paths(found)}) at="$at $word" ;;
    esac
  done
  local -a choices
  case "$at $last" in
{_cases(found, "    ", lambda words: f"choices=({words})")}
    *)
      case "$at" in
{_places(found, "        ", lambda words: f"choices=({words})", '"$current"')}
      esac ;;
  esac
  (( $#choices )) && compadd -a choices
  [[ "$current" == -* ]] || _files
}}
compdef _hf_attn hf-attn
"""


def fish(found: list[Place]) -> str:
    """The script for fish."""
    lines = [
        f"# Completion of hf-attn for fish: {HOW['fish']}",
        "function __hf_attn_at",
        '  set -l at ""',
        "  for word in (commandline -opc)[2..-1]",
        '    switch "$at $word"',
        f"      case {' '.join(shlex.quote(place.path) for place in found if place.path)}",
        '        set at "$at $word"',
        "    end",
        "  end",
        '  test "$at" = "$argv[1]"',
        "end",
    ]
    for place in found:
        here = f"complete -c hf-attn -n {shlex.quote('__hf_attn_at ' + shlex.quote(place.path))}"
        for name, what in place.commands.items():
            lines.append(f"{here} -f -a {name} -d {shlex.quote(_plain(what))}")
        if place.words:
            lines.append(f"{here} -a {shlex.quote(' '.join(place.words))}")
        for flag, what in place.options.items():
            choices = f" -x -a {shlex.quote(' '.join(place.choices[flag]))}" if flag in place.choices else ""
            lines.append(f"{here} -l {flag[2:]} -d {shlex.quote(_plain(what))}{choices}")
    return "\n".join(lines) + "\n"


def _paths(found: list[Place]) -> str:
    return "|".join(f'"{place.path}"' for place in found if place.path)


def _cases(found: list[Place], indent: str, say: Callable[[str], str]) -> str:
    """For each option with choices a line of the `case` over "command option"."""
    return "\n".join(
        f'{indent}"{place.path} {flag}") {say(" ".join(words))} ;;'
        for place in found
        for flag, words in place.choices.items()
    )


def _places(found: list[Place], indent: str, say: Callable[[str], str], current: str) -> str:
    """For each command a line of the `case` over commands: options after a dash, else what can stand there."""
    lines = []
    for place in found:
        options, words = " ".join(place.options), " ".join([*place.commands, *place.words])
        lines.append(f'{indent}"{place.path}") case {current} in -*) {say(options)} ;; *) {say(words)} ;; esac ;;')
    return "\n".join(lines)


def _plain(text: str) -> str:
    return " ".join(text.replace("%%", "%").split())
