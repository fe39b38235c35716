"""Where the weights of a model lie: what `context_parallel` runs, and what it refuses before any work."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.comm.launch import DEEPSPEED


def is_sharded(model: nn.Module) -> bool:
    """Whether this process stores parts of the weights only (DTensor)."""
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights lie in CPU memory or on disk and are loaded layer by layer (Accelerate's hooks)."""
    return any(parameter.is_meta for parameter in model.parameters()) and any(
        hasattr(module, "_hf_hook") for module in model.modules()
    )


def refuse_deepspeed(model: Any) -> None:
    """Raise NotImplementedError for a DeepSpeed engine, or a model whose weights ZeRO 3 has divided."""
    is_engine = any(kind.__module__.startswith("deepspeed.") for kind in type(model).__mro__)
    if is_engine or any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise NotImplementedError(DEEPSPEED)


def refuse_placement(model: nn.Module, averaged: bool) -> None:
    """Refuse weights that lie where several ranks cannot use them.

    Raises:
        NotImplementedError: tensor parallel weights, or a model spread over several devices of one rank.
        ValueError: weights that FSDP2 has sharded, without `averaged`.
    """
    name, spread = type(model).__name__, devices_of(getattr(model, "hf_device_map", None))
    if (getattr(model, "_tp_size", None) or 1) > 1 or (is_sharded(model) and not _is_fsdp(model)):
        raise NotImplementedError(
            f"the weights of {name} are sharded by a tensor parallel plan, and context_parallel cuts prompts over the "
            "same processes: load it without tp_plan, and shard the weights by FSDP2."
        )
    if len(spread) > 1:
        raise NotImplementedError(
            f"{name} is spread over {', '.join(spread)} in one rank: load it with a device_map of one device, the rest "
            "on cpu or disk, or start one process per device."
        )
    if is_sharded(model) and not averaged:
        raise ValueError(f"the weights of {name} are sharded by FSDP2, which averages gradients: pass averaged=True.")


def devices_of(device_map: Any) -> list[str]:
    """The accelerators that a device map names, in order; CPU and disk are where weights are offloaded to."""
    named = {f"cuda:{place}" if isinstance(place, int) else str(place) for place in (device_map or {}).values()}
    return sorted(named - {"cpu", "disk"})


def _is_fsdp(model: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def check_device(model: nn.Module, group: Group) -> None:
    """Refuse a model on another kind of device than its rank's; offloaded weights come to that device by themselves.

    Raises:
        ValueError: such a model.
    """
    here = {parameter.device.type for parameter in model.parameters()}
    if group.device.type not in here and group.device.type != "mps" and not is_offloaded(model):
        raise ValueError(
            f"Accelerate gives rank {group.rank} the device {group.device} and its model is on "
            f"{', '.join(sorted(here))}: move it there first, model.to(accelerate.PartialState().device)."
        )
