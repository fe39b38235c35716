"""A measurement by several processes of one launch, which is given its case as a file."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def launched(module: str, case: Any, ranks: int, timeout: float) -> Iterator[Path]:
    """Run `python -m module FILE` on `ranks` processes of this machine; the folder with FILE, into which they write.

    Args:
        module: dotted name of a module that is a command.
        case: JSON-ready values, which FILE holds.
        timeout: seconds.

    Raises:
        OSError: the launch failed; the message has its first error.
        subprocess.TimeoutExpired: it took longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "case.json")
        path.write_text(json.dumps(case), encoding="utf-8")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        done = subprocess.run([*launcher, "-m", module, str(path)], capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "Error: " in line] or done.stderr.splitlines()
            raise OSError(f"the launch of {ranks} ranks failed: {errors[0] if errors else done.returncode}")
        yield Path(folder)


def reports_of(module: str, case: Any, ranks: int, timeout: float) -> list[Any]:
    """What every rank of `launched` wrote into its `rank-N.json`, in the order of the ranks."""
    with launched(module, case, ranks, timeout) as folder:
        return [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
