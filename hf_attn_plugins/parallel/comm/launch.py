"""Where this process stands: Accelerate's state, or a process of its own, with launch mistakes told in one line."""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

import torch
import torch.distributed as dist

logger = logging.getLogger("hf_attn_plugins")


class Place(NamedTuple):
    """Rank and size of the launch, and the device Accelerate gives this process."""

    rank: int
    size: int
    device: torch.device


def place() -> Place:
    """This process's place in the launch; joins the launch's process group if nobody has yet.

    Raises:
        ValueError: the launch's environment makes no sense (a world of 0 processes, a rank outside of it).
        RuntimeError: the processes cannot meet (a port in use, a host that does not answer).
    """
    from accelerate import PartialState

    _check_environment()
    where = f"{os.environ.get('MASTER_ADDR', '127.0.0.1')}:{os.environ.get('MASTER_PORT', '29500')}"
    try:
        # Without an accelerator Accelerate looks for other processes only when it is told to use the CPU.
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
