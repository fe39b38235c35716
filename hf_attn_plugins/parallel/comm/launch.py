"""This process's rank, the number of ranks and its device, from Accelerate; launch mistakes raise one-line errors."""

from __future__ import annotations

import logging
import os
from typing import NamedTuple

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
