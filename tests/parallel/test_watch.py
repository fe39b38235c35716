"""Who is at fault, read from the ranks' records; and a store that no longer answers."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch

from hf_attn_plugins.parallel.comm import failure
from hf_attn_plugins.parallel.comm.failure import NoAnswer, RankError, Watch, answered, is_out_of_memory

RECORD = {"done": 7, "in": "merge", "waits": True, "left": False, "error": None, "victim": False}


class Recorded(Watch):
    """A watch that reads given records; every beat grows unless a record says otherwise."""

    def __init__(self, records: dict[int, dict[str, Any]]) -> None:
        self.rank, self.size, self._record, self._records, self._reads = 0, 3, {**RECORD}, records, 0

    def _read(self) -> dict[int, dict[str, Any]]:
        self._reads += 1
        return {rank: {**RECORD, "beat": self._reads, **record} for rank, record in self._records.items()}


@pytest.mark.parametrize(
    ("records", "message", "rank"),
    (
        ({1: {}, 2: {"done": 6}}, "rank 2 has not come for 5 seconds; it is through 6 exchanges", 2),
        ({1: {"waits": False}, 2: {}}, "rank 1 has not come for 5 seconds; it is through 7 exchanges", 1),
        ({1: {"in": None, "waits": False}, 2: {}}, "rank 1 has not come", 1),
        ({1: {}, 2: {"beat": 3, "waits": False}}, "rank 2 is gone", 2),
        ({1: {"error": "ValueError: no"}, 2: {"beat": 3}}, "rank 1 failed: ValueError: no", 1),
        ({1: {"error": "RankError: 2", "victim": True, "left": True}, 2: {"waits": False}}, "rank 2 has not come", 2),
        ({1: {}, 2: {"left": True}}, "rank 2 has left context_parallel before this exchange", 2),
        ({1: {}, 2: {}}, "no rank says why: timed out", None),
    ),
)
def test_who_is_at_fault(records, message, rank, monkeypatch):
    monkeypatch.setattr(failure, "BEAT", 0.001)
    monkeypatch.setattr(failure, "GONE", 0.005)
    found = Recorded(records).diagnose("merge", 5.0, RuntimeError("timed out\nat line 3"))
    assert message in str(found) and found.rank == rank and "\n" not in str(found)


def test_a_store_that_does_not_answer_is_given_up(monkeypatch):
    monkeypatch.setattr(failure, "GONE", 0.05)
    asked, never = [], threading.Event()

    class Silent:
        def check(self, keys: list[str]) -> bool:
            asked.append(keys)
            return never.wait(20)

        def get(self, key: str) -> bytes:
            never.wait(20)
            return b"{}"

    watch = object.__new__(Watch)
    watch.rank, watch.size, watch._store, watch._is_silent, watch._record = 1, 2, Silent(), False, {**RECORD}
    assert not watch.somebody_failed() and not watch.somebody_failed()
    assert len(asked) == 1, "a store that is silent is not asked again and again"
    found = watch.diagnose("merge", 5.0, RuntimeError("timed out"))
    assert isinstance(found, RankError) and found.rank == 0 and "rank 0 is gone or does not answer" in str(found)
    never.set()


def test_an_answer_or_its_error_comes_through():
    assert answered(lambda: 3) == 3
    with pytest.raises(KeyError):
        answered(lambda: {}["no"])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(NoAnswer, match="has not answered for"):
        patch.setattr(failure, "GONE", 0.01)
        answered(lambda: time.sleep(0.2))


def test_memory_that_a_rank_lacks_is_its_own_error():
    watch = object.__new__(Watch)
    for fail in (lambda: torch.empty(2**62, dtype=torch.uint8), _on_a_device):
        with pytest.raises(RuntimeError) as raised, watch.blaming("merge", 5.0):
            fail()
        assert is_out_of_memory(raised.value) and not isinstance(raised.value, RankError)
    assert not is_out_of_memory(RuntimeError("Connection closed by peer"))


def _on_a_device() -> None:
    raise torch.OutOfMemoryError("tried to allocate 2.00 GiB")
