"""This process's rank, the number of ranks and its device, from Accelerate; launch mistakes raise one-line errors."""

from __future__ import annotations

import datetime
import logging
import os
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

DEEPSPEED = (
    "context_parallel does not run under DeepSpeed, whose engine divides gradients itself: launch with FSDP2 or DDP "
    "(accelerate launch without --use_deepspeed)."
)
logger = logging.getLogger("hf_attn_plugins")


class Place(NamedTuple):
    """Rank, number of ranks, and the device that Accelerate gives this process."""

    rank: int
    size: int
    device: torch.device


def place() -> Place:
    """This process's `Place`; joins the launch's process group unless that has happened already.

    Raises:
        ValueError: the environment variables WORLD_SIZE and RANK contradict each other or are no numbers from 1 and 0.
        RuntimeError: the processes cannot connect (a port in use, a host that does not answer).
        NotImplementedError: a launch with DeepSpeed.
    """
    from accelerate import PartialState

    _check_environment()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
        raise NotImplementedError(DEEPSPEED)
    where = f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '29500')}"
    try:
        # Without an accelerator, Accelerate looks for other processes only with cpu=True.
        state = PartialState(cpu=not torch.accelerator.is_available())
    except dist.DistNetworkError as error:
        if "EADDRINUSE" in str(error) or "already in use" in str(error):
            raise RuntimeError(
                f"the port of {where} is in use by another program: choose a free one with "
                "`accelerate launch --main_process_port PORT`."
            ) from error
        raise RuntimeError(f"the processes cannot meet at {where}: {str(error).splitlines()[0]}") from error
    if not dist.is_available() or not dist.is_initialized():
        if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
            logger.warning(
                "accelerate launch was asked for several processes and has started this one only, as it does without "
                "GPUs: add --multi_gpu, which starts one process each on CPUs too. Going on in one process."
            )
        return Place(0, 1, state.device)
    return Place(dist.get_rank(), dist.get_world_size(), state.device)


class Joined(NamedTuple):
    """This process in its group of the launch.

    Attributes:
        place: number in the group, number of processes of the group, and device.
        handle: the process group; None for one process.
        number, groups: the number of this group, from 0, and the number of groups in the launch.
    """

    place: Place
    handle: Any
    number: int = 0
    groups: int = 1


def join(limit: float, ranks: int | None = None, members: Any = None) -> Joined:
    """Make the process groups of a launch; every process of it must call this with equal arguments.

    Args:
        limit: seconds after which the backend gives an exchange up.
        ranks: processes of a group. Example: with 2, a launch of 4 has the groups 0 1 and 2 3. None for all.
        members: instead of `ranks`, a process group of torch.distributed: its ranks become this process's group.

    Raises:
        ValueError: groups of unequal size or that overlap, `members` that are no process group of this process, both
            arguments, or the errors of `place`.
        RuntimeError: the processes cannot connect.
    """
    rank, launched, device = place()
    groups = _of_size(launched, ranks) if members is None else _of_members(members, launched, ranks)
    number = next(i for i, each in enumerate(groups) if rank in each)
    own = groups[number]
    here = Place(own.index(rank), len(own), device)
    if len(own) == 1:
        return Joined(here, None, number, len(groups))
    backend = "nccl" if device.type == "cuda" and "nccl" in str(dist.get_backend()) else None
    timeout = datetime.timedelta(seconds=limit)
    # Every process of the launch takes part in making every group.
    handles = [dist.new_group(each if len(groups) > 1 else None, timeout, backend) for each in groups]
    return Joined(here, handles[number], number, len(groups))


def _of_size(launched: int, ranks: int | None) -> list[list[int]]:
    size = launched if ranks is None else ranks
    if size < 1 or launched % size:
        raise ValueError(f"ranks={ranks}: groups of equal size are needed, and the launch has {launched} processes.")
    return [list(range(first, first + size)) for first in range(0, launched, size)]


def _of_members(members: Any, launched: int, ranks: int | None) -> list[list[int]]:
    if ranks is not None:
        raise ValueError(f"ranks={ranks} and group=...: pass one of them.")
    if not isinstance(members, dist.ProcessGroup):
        raise ValueError(
            f"group={members!r} is no process group of this process: pass for example "
            'init_device_mesh("cuda", (2, 2), mesh_dim_names=("context", "tensor"))["context"].get_group().'
        )
    everyone: list[Any] = [None] * launched
    dist.all_gather_object(everyone, sorted(dist.get_process_group_ranks(members)))
    groups = sorted({tuple(each) for each in everyone})
    if len({len(each) for each in groups}) > 1 or sum(map(len, groups)) != launched:
        raise ValueError(f"group=...: groups of equal size without a common rank are needed, the ranks gave {groups}.")
    return [list(each) for each in groups]


def _check_environment() -> None:
    size, rank = os.environ.get("WORLD_SIZE"), os.environ.get("RANK")
    for name, given, least in (("WORLD_SIZE", size, 1), ("RANK", rank, 0)):
        if given is not None and (not given.lstrip("-").isdigit() or int(given) < least):
            raise ValueError(
                f"{name}={given}: a launch has at least 1 process with ranks from 0; start it with "
                "`accelerate launch --num_processes N script.py`."
            )
    if size is not None and rank is not None and int(rank) >= int(size):
        raise ValueError(f"RANK={rank} in a launch of WORLD_SIZE={size}: ranks are 0 .. {int(size) - 1}.")
