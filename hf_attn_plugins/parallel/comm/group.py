"""The ranks of one launch and the exchanges between them, on NCCL or gloo, with their bytes counted.

In one process every exchange returns its input, so callers need no case for a single rank. Tensors are sent as bytes:
every dtype then works on every backend, and one message can hold both out and lse.
"""

from __future__ import annotations

import contextlib
import gc
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_attn_plugins.core.gradient import needs_gradient
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.core.tensor_bytes import from_bytes, num_bytes, to_bytes
from hf_attn_plugins.parallel.comm.failure import RankError, Watch
from hf_attn_plugins.parallel.comm.launch import join
from hf_attn_plugins.parallel.comm.traffic import Traffic

__all__ = ["Group", "RankError"]

_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13
LOOK = 1.0  # seconds between two checks whether another rank has failed


class Group:
    """All ranks of a launch, or some of them, connected by a process group of this package.

    Attributes:
        rank, size: the number of this process in the group, from 0, and the number of processes of the group.
        device: the device that Accelerate gives this process.
        timeout: seconds that a rank waits for the others in one exchange.
        traffic: bytes exchanged so far, by the name of the exchange.
        index, count: the number of this group, from 0, and the number of groups in the launch.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        device: torch.device,
        timeout: float = 60.0,
        handle: Any = None,
        index: int = 0,
        count: int = 1,
    ) -> None:
        self.rank, self.size, self.device, self.timeout = rank, size, device, timeout
        self.index, self.count = index, count
        self.traffic = Traffic()
        self._handle, self._watch = handle, None
        if handle is not None:
            self._polls = dist.get_backend(handle) == "gloo"  # NCCL's waiting happens on the device
            self._wire = torch.device("cpu") if self._polls else device
            self._watch = Watch(rank, size, index)

    @classmethod
    def join(cls, timeout: float = 60.0, ranks: int | None = None, members: Any = None) -> Group:
        """This process's group of the launch; a group of one outside of a distributed launch.

        Every rank of the launch must call it, and must call `leave` at the end.

        Args:
            timeout: seconds that a rank waits for the others in one exchange.
            ranks, members: see `launch.join`.

        Raises:
            ValueError: a timeout that is not positive, or the errors of `launch.join`.
            RuntimeError: the processes cannot connect.
        """
        if not timeout > 0:
            raise ValueError(f"timeout={timeout}: a positive number of seconds is needed.")
        # The backend's limit is a little longer than ours, because only our error names the missing rank. It is not
        # much longer, because an abandoned exchange keeps this process alive until the backend's limit.
        place, handle, number, groups = join(timeout + LOOK, ranks, members)
        return cls(*place, timeout, handle, number, groups)

    @classmethod
    def alone(cls, device: torch.device | None = None, timeout: float = 60.0) -> Group:
        """A group of this process only."""
        return cls(0, 1, device or torch.device("cpu"), timeout)

    def leave(self, error: BaseException | None = None) -> None:
        """Close the group. Without an `error`, wait until all ranks have called it; with one, record it for the others.

        Raises:
            RankError: another rank failed or does not answer, so that it will not call `leave`.
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
        gc.collect()  # connections close with the last reference, so that waiting ranks fail at once

    def all_gather(
        self, tensor: Tensor, sizes: Sequence[int] | None = None, dim: int = 0, *, what: str = "gather"
    ) -> list[Tensor]:
        """The tensors of all ranks, in the order of the ranks, on every rank; differentiable.

        Args:
            tensor: of the same shape on all ranks; with `sizes`, dimension `dim` may differ.
            sizes: length of dimension `dim` on each rank; shorter tensors are sent padded to the longest.

        Raises:
            RankError: a rank is gone or does not answer.
        """
        if self.size == 1:
            return [tensor]
        if needs_gradient(tensor):
            from hf_attn_plugins.parallel.comm.collectives import AllGather

            return list(AllGather.apply(self, tensor, sizes, dim, what))
        return self._all_gather(tensor, sizes, dim, what)

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
        if self.size == 1:
            return [pieces[0]]
        return self._all_to_all(pieces, shapes, what)

    def gather_partials(self, part: Partial, *, what: str = "merge") -> list[Partial]:
        """The partial results of all ranks, in the order of the ranks, each sent as one message; differentiable.

        Bytes from each rank to each other rank: rows x heads x (Dv x bytes per element of out + bytes per lse).
        """
        if self.size == 1:
            return [part]
        if needs_gradient(*part):
            from hf_attn_plugins.parallel.comm.collectives import GatherPartials

            flat = GatherPartials.apply(self, what, part.out, part.lse)
            return [Partial(*both) for both in zip(flat[: self.size], flat[self.size :], strict=True)]
        return self._gather_partials(part, what)

    def _gather_partials(self, part: Partial, what: str) -> list[Partial]:
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
        """The tensor of rank `source`, on every rank; other ranks pass one of the same shape and dtype."""
        if self.size == 1:
            return tensor
        message = to_bytes(tensor).to(self._wire, copy=True)
        others = (self.size - 1) * len(message)
        sent, received = (others, 0) if self.rank == source else (0, len(message))
        with self._exchange(what, sent, received) as wait:
            wait(dist.broadcast(message, group_src=source, group=self._handle, async_op=True))
        return from_bytes(message.to(tensor.device), tensor.dtype, tensor.shape)

    def collect(self, tensor: Tensor, *, what: str = "collect") -> Tensor:
        """Combine tensors of one shape in which each element is non-zero on at most one rank."""
        if self.size == 1:
            return tensor
        message = to_bytes(tensor).to(self._wire, copy=True)
        others = (self.size - 1) * len(message)
        with self._exchange(what, others, others) as wait:
            # The bytes are added up; at each place all ranks but one have zero bytes.
            wait(dist.all_reduce(message, group=self._handle, async_op=True))
        return from_bytes(message.to(tensor.device), tensor.dtype, tensor.shape)

    def sum(self, tensor: Tensor, *, what: str = "sum") -> Tensor:
        """The sum over ranks of tensors with one shape and dtype, on every rank; not differentiable."""
        if self.size == 1:
            return tensor
        total = tensor.detach().to(self._wire, copy=True)
        others = (self.size - 1) * total.numel() * total.element_size()
        with self._exchange(what, others, others) as wait:
            wait(dist.all_reduce(total, group=self._handle, async_op=True))
        return total.to(tensor.device)

    def objects(self, value: Any, *, what: str = "objects") -> list[Any]:
        """The values of all ranks, in the order of the ranks, on every rank. Each is pickled: for small values only."""
        if self.size == 1:
            return [value]
        message = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [int(size) for size in self._all_gather(torch.tensor([len(message)]), None, 0, what)]
        return [pickle.loads(data.numpy().tobytes()) for data in self._all_gather(message, sizes, 0, what)]

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
        gathered = message.new_empty(self.size * len(message))
        others = (self.size - 1) * len(message)
        with self._exchange(what, others, others) as wait:
            if len(message):
                wait(_GATHER(gathered, message, group=self._handle, async_op=True))
        shards = from_bytes(gathered.to(tensor.device), tensor.dtype, (self.size, *moved.shape))
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
        received = messages[0].new_empty(sum(arriving))
        with self._exchange(what, sum(sent) - sent[self.rank], sum(arriving) - arriving[self.rank]) as wait:
            all_sent = torch.cat(messages)
            wait(dist.all_to_all_single(received, all_sent, arriving, sent, group=self._handle, async_op=True))
        parts = received.to(device).split(arriving)
        return [from_bytes(part, dtype, shape) for part, shape in zip(parts, shapes, strict=True)]

    @contextlib.contextmanager
    def _exchange(self, what: str, sent: int, received: int) -> Iterator[Callable[[Any], None]]:
        """Count an exchange, give the function that waits for it, and turn a backend's error into a `RankError`."""
        if self._handle is None or self._watch is None:
            raise RuntimeError(f"the group of rank {self.rank} was left: open a new context_parallel(...).")
        self.traffic.add(what, sent, received)
        self._watch.enter(what)
        try:
            yield self._wait
        except RuntimeError as error:  # gloo and NCCL raise it for a lost or silent rank
            raise self._watch.diagnose(what, self.timeout, error) from error
        self._watch.passed()

    def _wait(self, work: Any) -> None:
        if not self._polls:
            work.wait()
            return
        assert self._watch is not None
        self._watch.wait_for(work, self.timeout, LOOK)
