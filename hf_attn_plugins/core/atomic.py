"""Replace a file as a whole: a reader sees the old contents or the new ones, never a part."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Write a new file beside `path`, flush it to the disk, and rename it to `path`.

    Args:
        path: the file to replace or to make; its folder exists.
        write: called with the path of the temporary file, which it creates.

    Raises:
        OSError: the file cannot be written. `path` is then unchanged, and the temporary file is removed. The same holds
            for any error that `write` raises.

    Example:
        replace_file(Path("run.json"), lambda file: file.write_text("{}", encoding="utf-8"))
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
