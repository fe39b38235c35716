"""Whether all ranks mean the same: options, models, versions and inputs are compared before any work is done."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.parallel.comm.group import Group


def agree(group: Group, values: Mapping[str, Any], *, what: str) -> None:
    """Compare small printable values on all ranks.

    Raises:
        ValueError: on every rank, with what differs, where, and from what.
    """
    everyone = group.objects({name: str(value) for name, value in values.items()}, what=what)
    lines = []
    for name in everyone[0]:
        first = everyone[0][name]
        others = [(rank, found.get(name)) for rank, found in enumerate(everyone) if found.get(name) != first]
        if others:
            rank, found = others[0]
            more = f" (and {len(others) - 1} more ranks)" if len(others) > 1 else ""
            lines.append(f"{name} is {found} on rank {rank}{more} and {first} on rank 0")
    if lines:
        raise ValueError(f"the ranks differ in their {what}: {'; '.join(lines)}. Nothing was computed.")


def digest(tensor: Tensor | None) -> str:
    """Shape and a short hash of a tensor's contents."""
    if tensor is None:
        return "None"
    contents = tensor.detach().cpu().contiguous()
    if contents.dtype == torch.bool:
        contents = contents.to(torch.uint8)
    numbers = contents.flatten().view(torch.uint8).numpy().tobytes()
    return f"{tuple(tensor.shape)} {hashlib.sha256(numbers).hexdigest()[:12]}"


def same_random_state(group: Group) -> None:
    """Give every rank the state of rank 0's generators, so that all of them sample the same tokens."""
    state: Any = None
    if group.rank == 0:
        state = (torch.get_rng_state(), torch.cuda.get_rng_state() if group.device.type == "cuda" else None)
    host, device = group.objects(state, what="random state")[0]
    torch.set_rng_state(host)
    if device is not None and group.device.type == "cuda":
        torch.cuda.set_rng_state(device)
