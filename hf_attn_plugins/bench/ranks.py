"""A measurement by several processes of one launch, which is given its case as a file."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A network namespace of its own, whose only interface, the loopback, sends no faster than `rate`. It needs root.
_SLOW = 'ip link set lo up && tc qdisc add dev lo root tbf rate {rate} burst 256kb latency 100ms && exec "$@"'


@contextlib.contextmanager
def launched(module: str, case: Any, ranks: int, timeout: float, link: str | None = None) -> Iterator[Path]:
    """Run `python -m module FILE` on `ranks` processes of this machine; the folder with FILE, into which they write.

    Every process computes with one thread.

    Args:
        module: dotted name of a module that is a command.
        case: JSON-ready values, which FILE holds.
        timeout: seconds.
        link: a rate as Linux's `tc` writes it, such as "1gbit", which all messages between the ranks share; None for
            the machine's own loopback. Needs root.

    Raises:
        OSError: the launch failed; the message has its first error.
        subprocess.TimeoutExpired: it took longer.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "case.json")
        path.write_text(json.dumps(case), encoding="utf-8")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command, environment = [*launcher, "-m", module, str(path)], {**os.environ, "OMP_NUM_THREADS": "1"}
        if link is not None:
            command = ["unshare", "--net", "sh", "-c", _SLOW.format(rate=link), "sh", *command]
            environment["GLOO_SOCKET_IFNAME"] = "lo"
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=environment)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "Error: " in line] or done.stderr.splitlines()
            raise OSError(f"the launch of {ranks} ranks failed: {errors[0] if errors else done.returncode}")
        yield Path(folder)


def reports_of(module: str, case: Any, ranks: int, timeout: float, link: str | None = None) -> list[Any]:
    """What every rank of `launched` wrote into its `rank-N.json`, in the order of the ranks."""
    with launched(module, case, ranks, timeout, link) as folder:
        return [json.loads((folder / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]
