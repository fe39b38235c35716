"""Work in a process that is killed before one of its steps on the disk."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

STEPS = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.truncate"}


def killed_before(step: int, work: Callable[[], object]) -> bool:
    """Do `work` in a process that ends without cleaning up before its step number `step`; False: it got through."""
    child = os.fork()
    if child == 0:
        count = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal count
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if event in STEPS or writes:
                count += 1
                if count == step:
                    os._exit(9)

        try:
            sys.addaudithook(watch)
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), f"the work failed before step {step}"
    return status == 9
