"""Ctrl-C is remembered: where some code on the way swallows the KeyboardInterrupt, the next `check` raises it again."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

_asked = False


@contextlib.contextmanager
def remembered() -> Iterator[None]:
    """Remember Ctrl-C while this lasts; without effect outside of the main thread, or where SIGINT has a handler."""
    global _asked
    _asked = False
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if ours:
        signal.signal(signal.SIGINT, _on_interrupt)
    try:
        yield
    finally:
        if ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)


def check() -> None:
    """Raise KeyboardInterrupt if Ctrl-C was pressed: to be called between two pieces of long work."""
    if _asked:
        raise KeyboardInterrupt


def asked() -> bool:
    """Whether Ctrl-C was pressed."""
    return _asked


def _on_interrupt(number: int, frame: Any) -> None:
    global _asked
    _asked = True
    raise KeyboardInterrupt
