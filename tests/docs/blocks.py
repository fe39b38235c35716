"""The Python blocks of a page, run in order as a reader would paste them."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
_BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path) -> list[str]:
    """The page's Python blocks."""
    return _BLOCK.findall(page.read_text(encoding="utf-8"))


def run(page: Path, names: dict[str, Any], after: Callable[[dict[str, Any]], None] = lambda names: None) -> str:
    """Run a page's blocks in one namespace, which keeps what they define; what they printed.

    Args:
        names: what the page says that the reader has.
        after: called with `names` after each block.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        for number, block in enumerate(blocks(page), 1):
            exec(compile(block, f"{page.name}, block {number}", "exec"), names)
            after(names)
    return printed.getvalue()
