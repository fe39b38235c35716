"""`hf-attn`: finds the command, parses its options, runs it, and turns what goes wrong into one line and a status."""

from __future__ import annotations

import sys

from hf_attn_plugins._version import __version__
from hf_attn_plugins.commands.table import Entry, Table, commands
from hf_attn_plugins.core import interrupt
from hf_attn_plugins.ui.suggest import did_you_mean

__all__ = ["commands", "main"]


def main(argv: list[str] | None = None) -> int:
    """Run `hf-attn` with these arguments.

    Returns:
        the exit status: 0 done, 1 where a command found what it looks for (a refused module, a limit that is broken),
        2 for bad input and 130 after Ctrl-C, the last two with one line on stderr.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    table, path = commands(), ["hf-attn"]
    if words and words[0] in ("--version", "-V"):
        print(_version())
        return 0
    while True:
        if not words or words[0] in ("-h", "--help"):
            print(_overview(path, table))
            return 0 if words else 2
        word = words.pop(0)
        path.append(word)
        if word not in table:
            known = ", ".join(table)
            hint = did_you_mean(word, table)
            print(f"{' '.join(path[:-1])}: no command {word!r}{hint}: choose one of {known}.", file=sys.stderr)
            return 2
        entry = table[word]
        if isinstance(entry, Entry):
            return _run(entry, " ".join(path), words)
        table = entry


def _run(entry: Entry, program: str, words: list[str]) -> int:
    try:
        with interrupt.remembered():
            arguments = entry.parser(program).parse_args(words)  # exits with status 2 and one line of its own
            return entry.run(arguments) or 0
    except KeyboardInterrupt:
        return _interrupted(entry, program)
    except (ValueError, NotImplementedError, OSError, ImportError) as error:
        if interrupt.asked():  # an import that was interrupted may end in another error
            return _interrupted(entry, program)
        text = " ".join(str(error).split())
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            text = f"{error.filename}: {error.strerror}."
        print(f"{program}: {text or type(error).__name__}", file=sys.stderr)
        return 2


def _interrupted(entry: Entry, program: str) -> int:
    print(f"{program}: interrupted: {entry.go_on}.", file=sys.stderr)
    return 130


def _version() -> str:
    """This package's version and what it stands on, read from the installed packages' records: nothing is imported."""
    from importlib.metadata import PackageNotFoundError, version

    found = [f"python {sys.version.split()[0]}"]
    for name in ("torch", "transformers"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} is not installed")
    return f"hf-attn-plugins {__version__} ({', '.join(found)})"


def _overview(path: list[str], table: Table) -> str:
    lines = [f"usage: {' '.join(path)} COMMAND ...", ""]
    for name, entry in table.items():
        what = entry.what if isinstance(entry, Entry) else " | ".join(entry)
        lines.append(f"  {name:<13} {what}")
    if len(path) == 1:
        lines += ["", "hf-attn COMMAND --help says more; hf-attn --version names the versions."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
