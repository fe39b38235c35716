"""Ranks as threads of one process: the exchanges of a group without processes, for many ranks at little cost."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.parallel.traffic import Traffic


class ThreadGroup:
    """What `parallel.Group` offers to `cqs_exchange`, between threads; an exchange that not all enter fails."""

    device = torch.device("cpu")

    def __init__(self, rank: int, size: int, board: dict[Any, Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self.traffic = rank, size, Traffic()
        self._board, self._barrier = board, barrier

    def all_to_all(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]], *, what: str) -> list[Tensor]:
        for other, piece in enumerate(pieces):
            self._board[self.rank, other] = (what, piece.clone())
        self._barrier.wait()
        arrived = [self._board[other, self.rank] for other in range(self.size)]
        self._barrier.wait()
        assert all(name == what for name, _ in arrived), "ranks stand in different exchanges"
        assert [list(x.shape) for _, x in arrived] == [list(shape) for shape in shapes], "sender and receiver disagree"
        sizes = [[len(x) for r, x in enumerate(each) if r != self.rank] for each in (pieces, [x for _, x in arrived])]
        self.traffic.add(what, sum(sizes[0]), sum(sizes[1]))
        return [x for _, x in arrived]


def on_ranks(size: int, function: Callable[[ThreadGroup], Any], timeout: float = 60.0) -> list[Any]:
    """The function's results on `size` ranks, in their order; the first error of any rank is raised."""
    board: dict[Any, Any] = {}
    barrier = threading.Barrier(size, timeout=timeout)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadGroup(rank, size, board, barrier))
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError) or not errors:
                errors.insert(0, error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
