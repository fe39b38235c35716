"""When things go wrong: whoever is at fault is named, on every rank, and nobody waits for ever."""

from __future__ import annotations

import multiprocessing
import os
import random
import socket

import pytest

from hf_attn_plugins.parallel.comm.failure import Watch
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.comm.launch import place
from tests.parallel import breaking
from tests.parallel.processes import environment, ranks

PREFILL, DECODING = 0, 3
MOST_EXCHANGES = 24


def run_broken(size: int, **how) -> list[tuple[str, dict]]:
    with ranks(size) as group:
        group.start(breaking.broken, **how)
        return group.results(40, skip=how["who"] if how["what"] == "hang" else None)


@pytest.mark.multi_process
@pytest.mark.parametrize(("who", "forward"), ((0, DECODING), (1, PREFILL)))
def test_a_killed_rank_is_named(who, forward):
    results = run_broken(3, who=who, what="kill", forward=forward, timeout=30)
    assert results[who] == ("died", -9)
    for rank in {0, 1, 2} - {who}:
        kind, found = results[rank]
        assert kind == "done" and found["rank"] == who and f"rank {who} is gone" in found["error"], found
        assert found["seconds"] < 25, "the others did not wait for the timeout"
        assert found["implementation"] == "sdpa", "the model is as it was"
    assert not multiprocessing.active_children(), "no process stays behind"


@pytest.mark.multi_process
def test_a_hanging_rank_is_named_within_the_timeout():
    results = run_broken(3, who=1, what="hang", forward=DECODING, timeout=3)
    for rank in (0, 2):
        kind, found = results[rank]
        assert kind == "done" and found["rank"] == 1 and "rank 1 has not come for 3 seconds" in found["error"], found
        assert 3 <= found["seconds"] < 25


@pytest.mark.multi_process
@pytest.mark.parametrize("who", (0, 2))
def test_out_of_memory_is_reported_by_all(who):
    results = run_broken(3, who=who, what="memory", forward=PREFILL, timeout=30)
    for rank, (kind, found) in enumerate(results):
        assert kind == "done" and "OutOfMemoryError: tried to allocate 2.00 GiB" in found["error"], found
        if rank != who:
            assert found["rank"] == who and f"rank {who} failed" in found["error"] and found["seconds"] < 25


def points(seed: int) -> list[tuple[str, str, int, int]]:
    """(method, what happens, rank, exchange) at random; two steps of training have more than `MOST_EXCHANGES`."""
    chance = random.Random(seed)
    methods, kinds = ("tiled_attention", "star_attention", "cqs_attention"), ("kill", "hang", "memory")
    return [
        (methods[i % 3], kinds[i // 3 % 3], chance.randrange(3), chance.randrange(1, MOST_EXCHANGES)) for i in range(20)
    ]


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize(("name", "what", "who", "exchange"), points(18))
def test_a_failure_anywhere_in_training_is_named(name, what, who, exchange):
    with ranks(3) as group:
        timeout = 5 if what == "hang" else 60
        group.start(breaking.broken_training, who=who, what=what, exchange=exchange, timeout=timeout, name=name)
        results = group.results(120, skip=who if what == "hang" else None)
    for rank in {0, 1, 2} - {who}:
        kind, found = results[rank]
        assert kind == "done" and found["error"] is not None and found["rank"] == who, (rank, found)
        assert "\n" not in found["error"]
    assert not multiprocessing.active_children(), "no process stays behind"


def places(seed: int) -> list[tuple[str, str, int, str, float]]:
    """(method, what happens, rank, where, share of the conversation) at random; every method with every failure."""
    chance = random.Random(seed)
    methods = ("tiled_attention", "star_attention", "cqs_attention")
    kinds, where = ("kill", "hang", "memory", "limit", "stop"), ("before", "within", "posted", "layer")
    return [
        (methods[i % 3], kinds[i % 5], chance.randrange(3), chance.choice(where), round(chance.random(), 3))
        for i in range(20)
    ]


@pytest.mark.slow
@pytest.mark.multi_process
@pytest.mark.parametrize(("name", "what", "who", "where", "share"), places(20))
def test_a_failure_anywhere_in_a_conversation_is_named(name, what, who, where, share):
    silent, timeout = what in ("hang", "stop"), 5 if what in ("hang", "stop") else 60
    with ranks(3) as group:
        group.start(
            breaking.broken_generation, who=who, what=what, where=where, share=share, timeout=timeout, name=name
        )
        results = group.results(120, skip=who if silent else None)
    assert not multiprocessing.active_children(), "no process stays behind"
    for rank in {0, 1, 2} - {who}:
        kind, found = results[rank]
        assert kind == "done" and found["error"] is not None and found["rank"] == who, (rank, found)
        assert found["error"].startswith("RankError: ") and "\n" not in found["error"]
        assert found["implementation"] == "sdpa" and found["hooks"] == 0, "the model is as it was"
        assert found["seconds"] < 30, "no rank waited for the timeout of a failure that is reported"
    if what == "kill":
        assert results[who] == ("died", -9)
    if what in ("memory", "limit"):
        kind, found = results[who]
        assert kind == "done" and not found["error"].startswith("RankError"), found
        said = "tried to allocate 2.00 GiB" if what == "memory" else "you tried to allocate 2147483648 bytes"
        assert said in found["error"] and found["implementation"] == "sdpa" and found["hooks"] == 0
        assert all(said in results[rank][1]["error"] for rank in {0, 1, 2} - {who}), "the others say why it failed"


@pytest.mark.multi_process
def test_ranks_that_differ_are_refused_before_any_work():
    expected = {
        "inputs": "the ranks differ in their inputs: input_ids is (1, 23)",
        "length": "input_ids is (1, 22)",
        "options": "the ranks differ in their set-up: options is",
        "method": "method is tiled_attention on rank 1 and star_attention on rank 0",
        "model": "the ranks differ in their set-up: model is",
        "version": "hf_attn_plugins is 9.9.9 on rank 1 and",
    }
    with ranks(2) as group:
        for how, message in expected.items():
            found = group.run(breaking.differ, how=how)
            for result in found:
                assert message in result["error"] and "Nothing was computed" in result["error"], (how, result["error"])
                assert result["computed"] == 0 and result["again"] == found[0]["again"]


@pytest.mark.parametrize(
    ("size", "rank", "message"),
    (("0", "0", "WORLD_SIZE=0"), ("x", "0", "WORLD_SIZE=x"), ("2", "2", "RANK=2"), ("2", "-1", "RANK=-1")),
)
def test_a_launch_that_makes_no_sense_is_refused(monkeypatch, size, rank, message):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", rank)
    with pytest.raises(ValueError, match=message) as raised:
        place()
    assert "\n" not in str(raised.value)


class Work:
    """A backend's exchange that has ended, by `error` or without one, right after it was said to be late."""

    def __init__(self, error: Exception | None) -> None:
        self.error, self.asked = error, 0

    def is_completed(self) -> bool:
        return self.asked > 0

    def wait(self, timeout: object = None) -> None:
        self.asked += 1
        if self.asked == 1:
            raise RuntimeError("Operation timed out!")
        if self.error is not None:
            raise self.error


def test_an_exchange_that_ends_while_it_is_looked_at_keeps_its_error():
    group = Group.alone()
    group._polls, group._watch = True, Quiet()
    group._wait(Work(None))
    with pytest.raises(RuntimeError, match="Connection closed by peer"):
        group._wait(Work(RuntimeError("Connection closed by peer")))


class Quiet(Watch):
    def __init__(self) -> None:
        pass

    def somebody_failed(self) -> bool:
        return False


def test_a_timeout_is_a_positive_number():
    with pytest.raises(ValueError, match="timeout=0"):
        Group.join(0)


@pytest.mark.multi_process
def test_a_port_in_use_is_told_in_one_line():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with ranks(1) as group:
            (found,) = group.run(_meet, port=port)
    assert f"the port of 127.0.0.1:{port} is in use" in found and "--main_process_port" in found
    assert "\n" not in found


def _meet(rank: int, size: int, port: int) -> str:
    os.environ.update(environment(0, 2, port))
    try:
        place()
    except RuntimeError as error:
        return str(error)
    return "met"
