"""Who is to blame when an exchange fails: every rank keeps a short record in the launch's store, and reads the others'.

A record is how many exchanges the rank has been through, whether it stands in one, an error it ended with, and a beat
that a thread renews, so that a rank which hangs (it beats, but is behind) can be told from one that is gone (no beat).
"""

from __future__ import annotations

import contextlib
import itertools
import json
import threading
import time
from typing import Any

import torch.distributed as dist

from hf_attn_plugins.core.compat import default_store

BEAT = 0.5  # seconds between two beats
GONE = 6 * BEAT  # seconds without a beat after which a rank counts as gone
_SESSIONS = itertools.count()  # every rank opens its groups in the same order
Records = dict[int, dict[str, Any]]


class RankError(RuntimeError):
    """An exchange that failed because of another rank.

    Attributes:
        rank: the rank at fault, or None where it cannot be told.
    """

    def __init__(self, message: str, rank: int | None) -> None:
        super().__init__(message)
        self.rank = rank


class Watch:
    """This rank's record, and the others' when something went wrong."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self._store = dist.PrefixStore(f"hf_attn_plugins/{next(_SESSIONS)}", default_store())
        self._lock, self._end = threading.Lock(), threading.Event()
        self._record: dict[str, Any] = {"done": 0, "in": None, "beat": 0, "left": False, "error": None, "victim": False}
        self._write()
        self._thread = threading.Thread(target=self._beat, name="hf_attn_plugins beat", daemon=True)
        self._thread.start()

    def enter(self, what: str) -> None:
        """This rank stands in an exchange."""
        self._record["in"] = what

    def passed(self) -> None:
        """It is through."""
        self._record["done"] += 1
        self._record["in"] = None

    def stop(self, error: BaseException | None) -> None:
        """End the beat; an `error` of this rank is left for the others to read."""
        self._end.set()
        self._thread.join(timeout=2 * BEAT)
        self._record["left"] = True
        if error is not None:
            text = str(error).splitlines()
            self._record["error"] = f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")
            self._record["victim"] = isinstance(error, RankError)
        with contextlib.suppress(RuntimeError):  # the store may be what is gone
            self._write()
            if error is not None:
                if not self._record["victim"]:
                    self._store.set("failed", str(self.rank))
                if self.rank == 0:
                    self._outlive()

    def somebody_failed(self) -> bool:
        """Whether a rank has left an error of its own."""
        return self._store.check(["failed"])

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
            return RankError(f"{head}: rank 0 is gone, and the store it keeps with it.", 0)
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
        late, record = min(records.items(), key=lambda item: (item[1]["done"], item[1]["in"] is not None))
        if record["done"] < self._record["done"] or record["in"] is None:
            return RankError(
                f"{head}: rank {late} has not come for {timeout:g} seconds; it is through {record['done']} exchanges. "
                "Raise timeout= if it is only slow.",
                late,
            )
        return RankError(f"{head} failed, and no rank says why: {str(error).splitlines()[0]}", None)

    def _outlive(self) -> None:
        """Rank 0 may keep the store in its own process: after an error it stays until the others have read it."""
        end = time.monotonic() + 3 * GONE
        while time.monotonic() < end and not all(record["left"] for record in self._read().values()):
            time.sleep(BEAT)

    def _read(self) -> Records:
        others = [rank for rank in range(self.size) if rank != self.rank]
        return {rank: json.loads(self._store.get(str(rank))) for rank in others}

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


def _failed(records: Records) -> Records:
    """Those that ended by an error of their own, not by one about another rank."""
    return {rank: record for rank, record in records.items() if record["error"] and not record["victim"]}
