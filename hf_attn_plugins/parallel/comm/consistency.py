"""Checks before any attention is computed that all ranks have equal options, models, versions and inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_attn_plugins.parallel.comm.group import Group

T = TypeVar("T")
ERRORS = (FileNotFoundError, OSError, NotImplementedError, ValueError)  # what `together` passes on to the other ranks


def agree(group: Group, values: Mapping[str, Any], *, what: str) -> None:
    """Check that named values are equal on all ranks, compared as text.

    Args:
        group: the ranks; all of them must call it.
        values: name -> value with a short text.
        what: what the values are, for the error: "set-up", "inputs".

    Raises:
        ValueError: on every rank, if a value differs; the text says which value, on which rank, and both values.
    """
    everyone = group.objects({name: str(value) for name, value in values.items()}, what=what)
    lines = []
    for name in everyone[0]:
        first = everyone[0][name]
        others = [(rank, given.get(name)) for rank, given in enumerate(everyone) if given.get(name) != first]
        if others:
            rank, other = others[0]
            more = f" (and {len(others) - 1} more ranks)" if len(others) > 1 else ""
            lines.append(f"{name} is {other} on rank {rank}{more} and {first} on rank 0")
    if lines:
        raise ValueError(f"the ranks differ in their {what}: {'; '.join(lines)}. Nothing was computed.")


def together(group: Group, work: Callable[[], T], *, what: str) -> list[T]:
    """Run `work` on every rank. If it fails on one rank, every rank raises, so that none waits for it.

    Args:
        group: the ranks; all of them must call it.
        work: reads or writes files, or checks arguments; its result is pickled and must be small.
        what: name of the exchange in `Traffic`.

    Returns:
        the results of all ranks, in the order of the ranks.

    Raises:
        OSError, ValueError, NotImplementedError: raised by `work` here, or on the lowest rank that failed; the text of
            the latter begins with that rank.
    """
    failed: Exception | None = None
    result: Any = None
    try:
        result = work()
    except ERRORS as error:
        failed = error
    number = next((i for i, kind in enumerate(ERRORS) if isinstance(failed, kind)), 0)
    everyone = group.objects(None if failed is None else (number, str(failed)), what=what)
    if failed is not None:
        raise failed
    for rank, found in enumerate(everyone):
        if found is not None:
            raise ERRORS[found[0]](f"rank {rank}: {found[1]}")
    return group.objects(result, what=what)


def digest(tensor: Tensor | None) -> str:
    """A tensor's shape and the first 12 hex digits of the SHA-256 of its elements; "None" for None."""
    if tensor is None:
        return "None"
    contents = tensor.detach().cpu().contiguous()
    if contents.dtype == torch.bool:
        contents = contents.to(torch.uint8)
    raw = contents.flatten().view(torch.uint8).numpy().tobytes()
    return f"{tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()[:12]}"


def same_random_state(group: Group, among: Any = None) -> None:
    """Set every rank's random generators to the state of rank 0's, so that all ranks sample the same tokens.

    Args:
        group: the ranks.
        among: a process group of other ranks instead, the first of which is rank 0 here.
    """
    state: Any = None
    if among is not None or group.rank == 0:
        state = (torch.get_rng_state(), torch.cuda.get_rng_state() if group.device.type == "cuda" else None)
    if among is None:
        state = group.objects(state, what="random state")[0]
    else:
        states = [state]
        dist.broadcast_object_list(states, dist.get_process_group_ranks(among)[0], among)
        state = states[0]
    host, device = state
    torch.set_rng_state(host)
    if device is not None and group.device.type == "cuda":
        torch.cuda.set_rng_state(device)
