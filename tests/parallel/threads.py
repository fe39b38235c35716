"""Ranks as threads of one process, with exchanges over a shared board: planning and attention without any launch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.parallel.comm.traffic import Traffic


class Board:
    """The exchanges of `parallel.Group` that methods use, among threads."""

    def __init__(self, rank: int, size: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._shared, self._barrier = rank, size, shared, barrier
        self.device, self.traffic = torch.device("cpu"), Traffic()

    def _swap(self, value: Any) -> list[Any]:
        self._shared[self.rank] = value
        self._barrier.wait(60)
        found = list(self._shared)
        self._barrier.wait(60)
        return found

    def all_to_all(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]], *, what: str = "") -> list[Tensor]:
        names, rows = zip(*self._swap((what, [piece.clone() for piece in pieces])), strict=True)
        assert set(names) == {what}, "ranks stand in different exchanges"
        found = [row[self.rank] for row in rows]
        assert [list(x.shape) for x in found] == [list(shape) for shape in shapes], "sender and receiver disagree"
        sent, received = (sum(x.nbytes for r, x in enumerate(each) if r != self.rank) for each in (pieces, found))
        self.traffic.add(what, sent, received)
        return found

    def start_all_to_all(self, *arguments: Any, what: str = "") -> Callable[[], list[Tensor]]:
        found = self.all_to_all(*arguments, what=what)  # the barriers of threads leave nothing to wait for
        return lambda: found

    def gather_partials(self, part: Partial, *, what: str = "") -> list[Partial]:
        return self._swap(Partial(part.out.clone(), part.lse.clone()))  # a copy, as the wire makes

    def broadcast(self, tensor: Tensor, source: int, *, what: str = "") -> Tensor:
        found = self._swap(tensor.clone())
        assert len({x.shape for x in found}) == 1, "a broadcast needs room of the right shape"
        return found[source]

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], dim: int = 0, *, what: str = "") -> list[Tensor]:
        found = self._swap(tensor.clone())
        assert [x.shape[dim] for x in found] == list(sizes)
        return found

    def start_all_gather(self, *arguments: Any, what: str = "") -> Callable[[], list[Tensor]]:
        found = self.all_gather(*arguments, what=what)
        return lambda: found


def on_threads(size: int, work: Callable[[Board], Any]) -> list[Any]:
    """`work(board)` on every rank."""
    shared, barrier, results = [None] * size, threading.Barrier(size), [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(Board(rank, size, shared, barrier))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return results
