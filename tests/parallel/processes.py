"""Real processes for the tests: n ranks started once, cases run inside them, results as JSON-ready values.

The ranks are forked from a server that has imported everything already, so that starting ten of them costs the imports
of one.
"""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import traceback
from collections.abc import Iterator
from typing import Any

from tests.forks import SERVER


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(rank: int, size: int, port: int) -> dict[str, str]:
    """What a launcher sets."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }


def _serve(rank: int, size: int, port: int, pipe: Any) -> None:
    os.environ.update(environment(rank, size, port))
    import torch

    torch.set_num_threads(1)
    _cached_sources()
    while True:
        job = pipe.recv()
        if job is None:
            break
        function, arguments = job
        try:
            torch.manual_seed(rank)  # ranks that are not made to agree would sample differently
            pipe.send(("done", function(rank, size, **arguments)))
        except BaseException as error:
            pipe.send(("raised", f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    pipe.close()
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def _cached_sources() -> None:
    """Transformers parses a model's source at every change of implementation: once is enough for a test."""
    from transformers import PreTrainedModel

    known = functools.cache(PreTrainedModel._can_set_attn_implementation.__func__)
    PreTrainedModel._can_set_attn_implementation = classmethod(lambda cls: known(cls))


class Ranks:
    """`size` processes of one launch."""

    def __init__(self, size: int) -> None:
        self.size, port = size, free_port()
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = SERVER.Pipe()
            process = SERVER.Process(target=_serve, args=(rank, size, port, there), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)

    def start(self, function: Any, **arguments: Any) -> None:
        for pipe in self.pipes:
            pipe.send((function, arguments))

    def results(self, timeout: float = 60.0, skip: int | None = None) -> list[tuple[str, Any]]:
        """("done", value), ("raised", text) or ("died", exit code) of every rank; rank `skip` is ended instead."""
        found: list[tuple[str, Any]] = []
        for rank, (pipe, process) in enumerate(zip(self.pipes, self.processes, strict=True)):
            if rank == skip:
                found.append(("skipped", None))
                continue
            try:
                assert pipe.poll(timeout), f"no answer from a rank within {timeout} seconds"
                found.append(pipe.recv())
            except (EOFError, ConnectionResetError):
                process.join(10)
                found.append(("died", process.exitcode))
        return found

    def run(self, function: Any, limit: float = 60.0, **arguments: Any) -> list[Any]:
        """The value of `function(rank, size, **arguments)` on every rank; fails where one raised."""
        self.start(function, **arguments)
        results = self.results(limit)
        for rank, (kind, value) in enumerate(results):
            assert kind == "done", f"rank {rank} {kind}: {value}"
        return [value for _, value in results]

    def close(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(2)
            if process.is_alive():
                process.kill()
                process.join(10)


@contextlib.contextmanager
def ranks(size: int) -> Iterator[Ranks]:
    group = Ranks(size)
    try:
        yield group
    finally:
        group.close()
