"""Finds the rank at fault when an exchange fails. Every rank writes a short record to the launch's key-value store.

A record holds the number of exchanges that the rank completed, the exchange that it is in, whether it has done its part
of that exchange and waits for the others, the error that it ended with, and a counter ("beat") that a thread raises
every `BEAT` seconds. A rank that hangs has a growing beat, and has completed fewer exchanges or does not wait. The beat
of a rank whose process ended no longer grows. The store itself may lie in a process that no longer answers.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from hf_attn_plugins.core.compat import default_store

BEAT = 0.5  # seconds between two beats
GONE = 6 * BEAT  # seconds without a beat after which a rank counts as gone
_SESSIONS = itertools.count()  # numbers the groups: every rank opens them in the same order
Records = dict[int, dict[str, Any]]
T = TypeVar("T")


class RankError(RuntimeError):
    """An exchange that failed because of another rank.

    Attributes:
        rank: the rank at fault, or None if that is unknown.
    """

    def __init__(self, message: str, rank: int | None) -> None:
        super().__init__(message)
        self.rank = rank


class Watch:
    """Writes this rank's record; reads the records of the group's other ranks after an error."""

    def __init__(self, rank: int, size: int, index: int = 0) -> None:
        self.rank, self.size = rank, size
        self._store = dist.PrefixStore(f"hf_attn_plugins/{next(_SESSIONS)}/{index}", default_store())
        self._lock, self._end = threading.Lock(), threading.Event()
        self._record: dict[str, Any] = {
            "done": 0, "in": None, "waits": False, "beat": 0, "left": False, "error": None, "victim": False
        }  # fmt: skip
        self._is_silent = False  # whether the store has not answered once; it is not asked again while ranks wait
        self._write()
        self._thread = threading.Thread(target=self._beat, name="hf_attn_plugins beat", daemon=True)
        self._thread.start()

    def enter(self, what: str) -> None:
        """This rank has entered the exchange `what`."""
        self._record.update({"in": what, "waits": False})

    def waits(self) -> None:
        """This rank has sent its part of the exchange, and waits for the others."""
        self._record["waits"] = True

    def passed(self) -> None:
        """This rank has completed the exchange."""
        self._record.update({"done": self._record["done"] + 1, "in": None, "waits": False})

    @contextlib.contextmanager
    def blaming(self, what: str, timeout: float) -> Iterator[None]:
        """Turn a backend's error in the exchange `what` into the `RankError` that names the rank at fault.

        Memory that this rank lacks is no other rank's fault: that error stays what it is.
        """
        try:
            yield
        except RuntimeError as error:  # gloo and NCCL raise it for a lost or silent rank
            if is_out_of_memory(error):
                raise
            raise self.diagnose(what, timeout, error) from error

    def stop(self, error: BaseException | None) -> None:
        """End the beat; an `error` of this rank is written to its record, so that the other ranks can read it."""
        self._end.set()
        self._thread.join(timeout=2 * BEAT)
        self._record["left"] = True
        if error is not None:
            text = str(error).splitlines()
            self._record["error"] = f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")
            self._record["victim"] = isinstance(error, RankError)
        with contextlib.suppress(RuntimeError):  # the process that keeps the store may have ended
            answered(self._write)
            if error is not None:
                if not self._record["victim"]:
                    answered(lambda: self._store.set("failed", str(self.rank)))
                if self.rank == 0:
                    self._outlive()

    def somebody_failed(self) -> bool:
        """Whether some rank has recorded an error that another rank did not cause; False without an answer."""
        if self._is_silent:
            return False
        try:
            return answered(lambda: self._store.check(["failed"]))
        except NoAnswer:
            self._is_silent = True
            return False

    def wait_for(self, work: Any, timeout: float, look: float) -> None:
        """Wait for a backend's exchange, `look` seconds at a time, until some rank has recorded an error.

        Raises:
            RuntimeError: the backend's error, or its "not yet" after `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while True:
            left = end - time.monotonic()
            try:
                work.wait(datetime.timedelta(seconds=max(0.01, min(look, left))))
                return
            except RuntimeError:  # the backend raises one type both for "not yet" and for "failed"
                if work.is_completed():
                    work.wait()  # completed in the meantime, or raises the backend's own error
                    return
                if left <= 0 or self.somebody_failed():
                    raise

    def diagnose(self, what: str, timeout: float, error: BaseException) -> RankError:
        """The error of an exchange `what` that failed here, naming the rank at fault."""
        head = f"rank {self.rank} of {self.size}, exchange {self._record['done']} ({what})"
        try:
            first = records = self._read()
            end = time.monotonic() + GONE
            while time.monotonic() < end and not _failed(records):
                time.sleep(BEAT)
                records = self._read()
        except RuntimeError:
            return RankError(f"{head}: rank 0 is gone or does not answer, with the launch's store.", 0)
        for rank, record in _failed(records).items():
            return RankError(f"{head}: rank {rank} failed: {record['error']}", rank)
        for rank, record in records.items():
            if not record["left"] and record["beat"] == first[rank]["beat"]:
                return RankError(
                    f"{head}: rank {rank} is gone: its process ended or its machine is out of reach.", rank
                )
        for rank, record in records.items():
            if record["left"] and record["error"] is None:
                return RankError(f"{head}: rank {rank} has left context_parallel before this exchange.", rank)
        late, record = min(records.items(), key=lambda item: (item[1]["done"], item[1]["waits"]))
        if record["done"] < self._record["done"] or not record["waits"]:
            return RankError(
                f"{head}: rank {late} has not come for {timeout:g} seconds; it is through {record['done']} exchanges. "
                "Raise timeout= if it is only slow.",
                late,
            )
        return RankError(f"{head} failed, and no rank says why: {str(error).splitlines()[0]}", None)

    def _outlive(self) -> None:
        """Keep rank 0 alive, as it may run the store, until all ranks have left or 3 x GONE seconds have passed."""
        end = time.monotonic() + 3 * GONE
        while time.monotonic() < end and not all(record["left"] for record in self._read().values()):
            time.sleep(BEAT)

    def _read(self) -> Records:
        others = [rank for rank in range(self.size) if rank != self.rank]
        return answered(lambda: {rank: json.loads(self._store.get(str(rank))) for rank in others})

    def _write(self) -> None:
        with self._lock:
            self._store.set(str(self.rank), json.dumps(self._record))

    def _beat(self) -> None:
        while not self._end.wait(BEAT):
            self._record["beat"] += 1
            try:
                self._write()
            except RuntimeError:
                return


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or PyTorch's CPU allocator, which has no error type of its own, got no more memory."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator: " in str(error)


class NoAnswer(RuntimeError):
    """The launch's store did not answer within `GONE` seconds."""


def answered(ask: Callable[[], T]) -> T:
    """What `ask` returns or raises; it is called in a thread of its own, for a call of the store has no time limit.

    Raises:
        NoAnswer: after `GONE` seconds. The thread goes on.
    """
    found: queue.SimpleQueue[tuple[T | None, BaseException | None]] = queue.SimpleQueue()

    def call() -> None:
        try:
            found.put((ask(), None))
        except BaseException as error:
            found.put((None, error))

    threading.Thread(target=call, name="hf_attn_plugins store", daemon=True).start()
    try:
        value, error = found.get(timeout=GONE)
    except queue.Empty:
        raise NoAnswer(f"the launch's store has not answered for {GONE:g} seconds.") from None
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def _failed(records: Records) -> Records:
    """The records with an error that another rank did not cause."""
    return {rank: record for rank, record in records.items() if record["error"] and not record["victim"]}
