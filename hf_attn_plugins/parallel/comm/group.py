"""The ranks of one launch, or some of them, on NCCL or gloo: how they meet and part, and exchanges with gradients."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_attn_plugins.core.gradient import needs_gradient
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.core.tensor_bytes import from_bytes, to_bytes
from hf_attn_plugins.parallel.comm.exchanges import LOOK, Exchanges
from hf_attn_plugins.parallel.comm.failure import RankError
from hf_attn_plugins.parallel.comm.launch import join

__all__ = ["Group", "RankError"]


class Group(Exchanges):
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
        super().__init__(rank, size, device, timeout, handle, index)
        self.index, self.count = index, count

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
        except BaseException as raised:
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
        return self.start_all_gather(tensor, sizes, dim, what=what)()

    def start_all_gather(
        self, tensor: Tensor, sizes: Sequence[int] | None = None, dim: int = 0, *, what: str = "gather"
    ) -> Callable[[], list[Tensor]]:
        """`all_gather` in two steps: the function that is returned waits. In between the rank computes while it sends.

        The tensor must not change in between, and no other exchange may start.
        """
        if self.size == 1:
            return lambda: [tensor]
        finish = self._start_all_gather(tensor, sizes, dim, what)
        if needs_gradient(tensor):
            from hf_attn_plugins.parallel.comm.collectives import AllGather

            return lambda: list(AllGather.apply(self, tensor, finish, what))
        return finish

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
        packed = self._start_all_gather(torch.cat([out, lse]), None, 0, what)()
        return [
            Partial(
                from_bytes(message[: len(out)], part.out.dtype, part.out.shape),
                from_bytes(message[len(out) :], part.lse.dtype, part.lse.shape),
            )
            for message in packed
        ]
