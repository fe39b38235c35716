"""The ranks of one launch and the few exchanges between them, on NCCL or gloo, counted in bytes.

In one process every exchange is a no-op with the same interface, so that nothing above this file asks how many ranks
there are. Tensors travel as bytes: every dtype works on every backend, and out and lse fit into one message.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.core.tensor_bytes import from_bytes, num_bytes, to_bytes
from hf_attn_plugins.parallel.comm.failure import RankError, Watch
from hf_attn_plugins.parallel.comm.launch import place
from hf_attn_plugins.parallel.comm.traffic import Traffic

__all__ = ["Group", "RankError"]

_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
LOOK = 1.0  # seconds between two looks at whether another rank has failed


class Group:
    """All ranks of a launch, with a process group of their own.

    Attributes:
        rank, size: this process among all of them.
        device: where Accelerate wants this process's model.
        timeout: seconds that a rank waits for the others in one exchange.
        traffic: bytes exchanged so far, by kind.
    """

    def __init__(self, rank: int, size: int, device: torch.device, timeout: float = 60.0, handle: Any = None) -> None:
        self.rank, self.size, self.device, self.timeout = rank, size, device, timeout
        self.traffic = Traffic()
        self._handle, self._watch = handle, None
        if handle is not None:
            self._polls = dist.get_backend(handle) == "gloo"  # NCCL's waiting happens on the device
            self._wire = torch.device("cpu") if self._polls else device
            self._watch = Watch(rank, size)

    @classmethod
    def join(cls, timeout: float = 60.0) -> Group:
        """The group of this launch as Accelerate knows it; a group of one outside of a distributed launch.

        Every rank of the launch must call it, and `leave` the group again.

        Raises:
            ValueError: a timeout that is no positive number of seconds, or see `launch.place`.
            RuntimeError: the processes cannot meet.
        """
        if not timeout > 0:
            raise ValueError(f"timeout={timeout}: a positive number of seconds is needed.")
        rank, size, device = place()
        if size == 1:
            return cls.alone(device, timeout)
        backend = "nccl" if device.type == "cuda" and "nccl" in str(dist.get_backend()) else None
        # The backend's own limit comes right after ours, which knows who is missing: an exchange that was given up
        # keeps this process from ending until then.
        limit = datetime.timedelta(seconds=timeout + LOOK)
        return cls(rank, size, device, timeout, dist.new_group(backend=backend, timeout=limit))

    @classmethod
    def alone(cls, device: torch.device | None = None, timeout: float = 60.0) -> Group:
        """A group of this process only."""
        return cls(0, 1, device or torch.device("cpu"), timeout)

    def leave(self, error: BaseException | None = None) -> None:
        """Take the group down again, once all have come; after an `error` the others are told, to name this rank.

        Raises:
            RankError: this rank is done and another one is not, and never will be.
        """
        if self._watch is None:
            return
        try:
            if error is None:
                self.objects(None, what="end")
        except RankError as raised:
            error = raised
            raise
        finally:
            self._watch.stop(error)
            self._close()

    def _close(self) -> None:
        handle, self._handle, self._watch = self._handle, None, None
        dist.destroy_process_group(handle)
        del handle
        gc.collect()  # connections close with the last reference: whoever waits for this rank learns it at once

    def all_gather(
        self, tensor: Tensor, sizes: Sequence[int] | None = None, dim: int = 0, *, what: str = "gather"
    ) -> list[Tensor]:
        """Every rank's tensor, on every rank, in the order of the ranks; differentiable.

        Args:
            tensor: of one shape on all ranks, but for dimension `dim` where `sizes` are given.
            sizes: length of dimension `dim` on each rank; shorter shards travel padded to the longest.

        Raises:
            RankError: a rank is gone or does not answer.
        """
        if self.size == 1:
            return [tensor]
        if torch.is_grad_enabled() and tensor.requires_grad:
            from hf_attn_plugins.parallel.comm.collectives import AllGather

            return list(AllGather.apply(self, tensor, sizes, dim, what))
        return self._all_gather(tensor, sizes, dim, what)

    def all_to_all(
        self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]], *, what: str = "exchange"
    ) -> list[Tensor]:
        """Send `pieces[r]` to rank r; return what each rank sent here, in the order of the ranks; not differentiable.

        Args:
            pieces: one tensor for every rank, of any shapes (empty ones included) and one dtype.
            shapes: the shape of what every rank sends here: both sides know the plan, no sizes travel.

        Raises:
            RankError: a rank is gone or does not answer.
        """
        if self.size == 1:
            return [pieces[0]]
        return self._all_to_all(pieces, shapes, what)

    def gather_partials(self, part: Partial, *, what: str = "merge") -> list[Partial]:
        """Every rank's partial result over its own keys, out and lse in one message; not differentiable.

        Bytes from each rank to each other one: rows x heads x (Dv x bytes of out + bytes of lse).
        """
        if self.size == 1:
            return [part]
        out, lse = to_bytes(part.out), to_bytes(part.lse)
        packed = self._all_gather(torch.cat([out, lse]), None, 0, what)
        return [
            Partial(
                from_bytes(message[: len(out)], part.out.dtype, part.out.shape),
                from_bytes(message[len(out) :], part.lse.dtype, part.lse.shape),
            )
            for message in packed
        ]

    def broadcast(self, tensor: Tensor, source: int, *, what: str = "broadcast") -> Tensor:
        """The tensor of rank `source`; the others pass one of the same shape and dtype, which is left as it is."""
        if self.size == 1:
            return tensor
        message = to_bytes(tensor).to(self._wire, copy=True)
        others = (self.size - 1) * len(message)
        sent, received = (others, 0) if self.rank == source else (0, len(message))
        with self._exchange(what, sent, received) as wait:
            wait(dist.broadcast(message, group_src=source, group=self._handle, async_op=True))
        return from_bytes(message.to(tensor.device), tensor.dtype, tensor.shape)

    def collect(self, tensor: Tensor, *, what: str = "collect") -> Tensor:
        """One tensor of which every element is filled in by one rank at most, and zero on the others."""
        if self.size == 1:
            return tensor
        message = to_bytes(tensor).to(self._wire, copy=True)
        others = (self.size - 1) * len(message)
        with self._exchange(what, others, others) as wait:
            # A sum of bytes: all but one of them are zero.
            wait(dist.all_reduce(message, group=self._handle, async_op=True))
        return from_bytes(message.to(tensor.device), tensor.dtype, tensor.shape)

    def sum(self, tensor: Tensor, *, what: str = "sum") -> Tensor:
        """The sum of all ranks' tensors, of one shape and dtype, on every rank."""
        if self.size == 1:
            return tensor
        found = tensor.detach().to(self._wire, copy=True)
        others = (self.size - 1) * found.numel() * found.element_size()
        with self._exchange(what, others, others) as wait:
            wait(dist.all_reduce(found, group=self._handle, async_op=True))
        return found.to(tensor.device)

    def objects(self, value: Any, *, what: str = "objects") -> list[Any]:
        """Every rank's picklable value, in the order of the ranks. Small things only."""
        if self.size == 1:
            return [value]
        message = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [int(size) for size in self._all_gather(torch.tensor([len(message)]), None, 0, what)]
        return [pickle.loads(found.numpy().tobytes()) for found in self._all_gather(message, sizes, 0, what)]

    def _all_gather(self, tensor: Tensor, sizes: Sequence[int] | None, dim: int, what: str) -> list[Tensor]:
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
        found = message.new_empty(self.size * len(message))
        others = (self.size - 1) * len(message)
        with self._exchange(what, others, others) as wait:
            if len(message):
                wait(_GATHER(found, message, group=self._handle, async_op=True))
        shards = from_bytes(found.to(tensor.device), tensor.dtype, (self.size, *moved.shape))
        return [shard[:length].movedim(0, dim) for shard, length in zip(shards, lengths, strict=True)]

    def _all_to_all(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]], what: str) -> list[Tensor]:
        if len(pieces) != self.size or len(shapes) != self.size:
            raise ValueError(
                f"all_to_all among {self.size} ranks needs as many pieces and shapes, got {len(pieces)}, {len(shapes)}."
            )
        device, dtype = pieces[self.rank].device, pieces[self.rank].dtype
        messages = [to_bytes(piece).to(self._wire) for piece in pieces]
        sent = [len(message) for message in messages]
        arriving = [num_bytes(shape, dtype) for shape in shapes]
        found = messages[0].new_empty(sum(arriving))
        with self._exchange(what, sum(sent) - sent[self.rank], sum(arriving) - arriving[self.rank]) as wait:
            all_sent = torch.cat(messages)
            wait(dist.all_to_all_single(found, all_sent, arriving, sent, group=self._handle, async_op=True))
        parts = found.to(device).split(arriving)
        return [from_bytes(part, dtype, shape) for part, shape in zip(parts, shapes, strict=True)]

    @contextlib.contextmanager
    def _exchange(self, what: str, sent: int, received: int) -> Iterator[Callable[[Any], None]]:
        """Count an exchange, wait for it, and turn a backend's error into one that names the rank at fault."""
        if self._handle is None or self._watch is None:
            raise RuntimeError(f"the group of rank {self.rank} was left: open a new context_parallel(...).")
        self.traffic.add(what, sent, received)
        self._watch.enter(what)
        try:
            yield self._wait
        except RuntimeError as error:  # what both gloo and NCCL raise for a lost or silent peer
            raise self._watch.diagnose(what, self.timeout, error) from error
        self._watch.passed()

    def _wait(self, work: Any) -> None:
        if not self._polls:
            work.wait()
            return
        assert self._watch is not None
        end = time.monotonic() + self.timeout
        while True:
            left = end - time.monotonic()
            try:
                work.wait(datetime.timedelta(seconds=max(0.01, min(LOOK, left))))
                return
            except RuntimeError:  # not yet, or never: a backend says both by the same type of error
                if work.is_completed():
                    work.wait()  # done in the meantime; or its own error, which must not be lost
                    return
                if left <= 0 or self._watch.somebody_failed():
                    raise
