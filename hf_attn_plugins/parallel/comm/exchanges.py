"""Exchanges between the ranks of a group, none of them differentiable. Each is posted first and waited for later.

In one process every exchange returns its input, so callers need no case for a single rank. Tensors are sent as bytes:
every dtype then works on every backend, and one message can hold both out and lse.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_attn_plugins.core.tensor_bytes import from_bytes, num_bytes, to_bytes
from hf_attn_plugins.parallel.comm.failure import Watch
from hf_attn_plugins.parallel.comm.traffic import Traffic

_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
LOOK = 1.0  # seconds between two checks whether another rank has failed


class Exchanges:
    """A process group of torch, with its bytes counted and its errors turned into `RankError`s.

    Attributes:
        rank, size, device, timeout, traffic: as in `Group`.
    """

    def __init__(self, rank: int, size: int, device: torch.device, timeout: float, handle: Any, index: int) -> None:
        self.rank, self.size, self.device, self.timeout = rank, size, device, timeout
        self.traffic = Traffic()
        self._handle: Any = handle
        self._watch: Watch | None = None
        if handle is not None:
            self._polls = dist.get_backend(handle) == "gloo"  # NCCL's waiting happens on the device
            self._wire = torch.device("cpu") if self._polls else device
            self._watch = Watch(rank, size, index)

    def all_to_all(
        self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]], *, what: str = "exchange"
    ) -> list[Tensor]:
        """Send `pieces[r]` to rank r; return what each rank sent here, in the order of the ranks; not differentiable.

        Args:
            pieces: one tensor per rank, of any shapes (also empty ones) and one dtype.
            shapes: the shape of the tensor that each rank sends here. Both sides know it, so no sizes are sent.

        Raises:
            RankError: a rank is gone or does not answer.
        """
        return self.start_all_to_all(pieces, shapes, what=what)()

    def start_all_to_all(
        self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]], *, what: str = "exchange"
    ) -> Callable[[], list[Tensor]]:
        """`all_to_all` in two steps, as `start_all_gather`."""
        if self.size == 1:
            return lambda: [pieces[0]]
        if len(pieces) != self.size or len(shapes) != self.size:
            raise ValueError(
                f"all_to_all among {self.size} ranks needs as many pieces and shapes, got {len(pieces)}, {len(shapes)}."
            )
        device, dtype = pieces[self.rank].device, pieces[self.rank].dtype
        messages = [to_bytes(piece).to(self._wire) for piece in pieces]
        sent = [len(message) for message in messages]
        arriving = [num_bytes(shape, dtype) for shape in shapes]
        received = messages[0].new_empty(sum(arriving))
        all_sent = torch.cat(messages)
        bytes_sent, bytes_received = sum(sent) - sent[self.rank], sum(arriving) - arriving[self.rank]
        post = lambda: dist.all_to_all_single(  # noqa: E731
            received, all_sent, arriving, sent, group=self._handle, async_op=True
        )
        wait = self._start(what, bytes_sent, bytes_received, post)

        def finish() -> list[Tensor]:
            wait()
            parts = received.to(device).split(arriving)
            return [from_bytes(part, dtype, shape) for part, shape in zip(parts, shapes, strict=True)]

        return finish

    def broadcast(self, tensor: Tensor, source: int, *, what: str = "broadcast") -> Tensor:
        """The tensor of rank `source`, on every rank; other ranks pass one of the same shape and dtype."""
        if self.size == 1:
            return tensor
        message = to_bytes(tensor).to(self._wire, copy=True)
        others = (self.size - 1) * len(message)
        sent, received = (others, 0) if self.rank == source else (0, len(message))
        post = lambda: dist.broadcast(message, group_src=source, group=self._handle, async_op=True)  # noqa: E731
        self._start(what, sent, received, post)()
        return from_bytes(message.to(tensor.device), tensor.dtype, tensor.shape)

    def collect(self, tensor: Tensor, *, what: str = "collect") -> Tensor:
        """Combine tensors of one shape in which each element is non-zero on at most one rank."""
        if self.size == 1:
            return tensor
        message = to_bytes(tensor).to(self._wire, copy=True)
        others = (self.size - 1) * len(message)
        # The bytes are added up; at each place all ranks but one have zero bytes.
        self._start(what, others, others, lambda: dist.all_reduce(message, group=self._handle, async_op=True))()
        return from_bytes(message.to(tensor.device), tensor.dtype, tensor.shape)

    def sum(self, tensor: Tensor, *, what: str = "sum") -> Tensor:
        """The sum over ranks of tensors with one shape and dtype, on every rank; not differentiable."""
        if self.size == 1:
            return tensor
        total = tensor.detach().to(self._wire, copy=True)
        others = (self.size - 1) * total.numel() * total.element_size()
        self._start(what, others, others, lambda: dist.all_reduce(total, group=self._handle, async_op=True))()
        return total.to(tensor.device)

    def objects(self, value: Any, *, what: str = "objects") -> list[Any]:
        """The values of all ranks, in the order of the ranks, on every rank. Each is pickled: for small values only."""
        if self.size == 1:
            return [value]
        message = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [int(size) for size in self._start_all_gather(torch.tensor([len(message)]), None, 0, what)()]
        return [pickle.loads(data.numpy().tobytes()) for data in self._start_all_gather(message, sizes, 0, what)()]

    def _start_all_gather(
        self, tensor: Tensor, sizes: Sequence[int] | None, dim: int, what: str
    ) -> Callable[[], list[Tensor]]:
        lengths = [tensor.shape[dim]] * self.size if sizes is None else list(sizes)
        if len(lengths) != self.size or tensor.shape[dim] != lengths[self.rank]:
            raise ValueError(
                f"rank {self.rank} gathers shards of lengths {lengths} and has one of {tensor.shape[dim]}: pass the "
                f"length of dimension {dim} on each of the {self.size} ranks."
            )
        longest, moved = max(lengths), tensor.movedim(dim, 0)
        if len(moved) < longest:
            moved = torch.cat([moved, moved.new_zeros(longest - len(moved), *moved.shape[1:])])
        message = to_bytes(moved).to(self._wire)
        gathered = message.new_empty(self.size * len(message))
        others = (self.size - 1) * len(message)
        post = lambda: _GATHER(gathered, message, group=self._handle, async_op=True) if len(message) else None  # noqa: E731
        wait, shape = self._start(what, others, others, post), moved.shape

        def finish() -> list[Tensor]:
            wait()
            shards = from_bytes(gathered.to(tensor.device), tensor.dtype, (self.size, *shape))
            return [shard[:length].movedim(0, dim) for shard, length in zip(shards, lengths, strict=True)]

        return finish

    def _start(self, what: str, sent: int, received: int, post: Callable[[], Any]) -> Callable[[], None]:
        """Count an exchange and `post` it; the function that is returned waits. A backend's error is a `RankError`."""
        watch = self._watch
        if self._handle is None or watch is None:
            raise RuntimeError(f"the group of rank {self.rank} was left: open a new context_parallel(...).")
        self.traffic.add(what, sent, received)
        watch.enter(what)
        with watch.blaming(what, self.timeout):
            work = post()

        def wait() -> None:
            watch.waits()
            with watch.blaming(what, self.timeout):
                if work is not None:
                    self._wait(work)
            watch.passed()

        return wait

    def _wait(self, work: Any) -> None:
        if not self._polls:
            work.wait()
            return
        assert self._watch is not None
        self._watch.wait_for(work, self.timeout, LOOK)
