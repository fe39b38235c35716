"""Progress of long work: a bar in a terminal for commands, tqdm's for Python, both with the time that is left."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

Progress = Callable[[str, int, int], None]


@contextlib.contextmanager
def terminal(shown: bool = True, *, transient: bool = True) -> Iterator[Progress]:
    """A function (what, done, total) that moves a bar on stderr, with the time so far and the time that is left.

    Where stderr is no terminal there is no bar.

    Args:
        shown: False gives a function that does nothing.
        transient: whether the bar goes away at the end.
    """
    if not shown:
        yield lambda what, done, total: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns: list[Any] = [TextColumn("{task.description:<28}"), BarColumn(), TaskProgressColumn()]
    columns += [TimeElapsedColumn(), TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left")]
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=transient, disable=not console.is_terminal) as bar:
        line = bar.add_task("starting", total=None)
        yield lambda what, done, total: bar.update(line, description=what, completed=done, total=total)


@contextlib.contextmanager
def python(given: Progress | bool | None) -> Iterator[Progress]:
    """What a Python verb reports its progress to.

    Args:
        given: a function (what, done, total); None for tqdm's bar in notebooks and terminals and for silence
            elsewhere; True for the bar everywhere, False for silence.
    """
    if callable(given):
        yield given
        return
    if given is False or (given is None and not (in_notebook() or sys.stderr.isatty())):
        yield lambda what, done, total: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=1, leave=False, bar_format="{desc}{percentage:3.0f}% {bar} {elapsed}<{remaining}") as bar:

        def update(what: str, done: int, total: int) -> None:
            bar.set_description(what, refresh=False)
            bar.total, bar.n = max(total, done, 1), done
            bar.refresh()

        yield update


def in_notebook() -> bool:
    """Whether this is code of a notebook: IPython runs it and its shell is a kernel's."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"
