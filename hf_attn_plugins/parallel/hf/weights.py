"""Where the weights of a model lie, as far as `context_parallel` has to know."""

from __future__ import annotations

from torch import nn

from hf_attn_plugins.parallel.comm.group import Group


def is_sharded(model: nn.Module) -> bool:
    """Whether this process stores parts of the weights only (DTensor)."""
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())


def check_device(model: nn.Module, group: Group) -> None:
    here = {parameter.device.type for parameter in model.parameters()}
    if group.device.type not in here and group.device.type != "mps":
        raise ValueError(
            f"Accelerate gives rank {group.rank} the device {group.device} and its model is on "
            f"{', '.join(sorted(here))}: move it there first, model.to(accelerate.PartialState().device)."
        )
