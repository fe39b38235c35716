"""Where the weights of a model lie: what `context_parallel` runs, and what it refuses before any work."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.distributed as dist
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
    weights = model.parameters() if isinstance(model, nn.Module) else ()
    if is_engine or any(hasattr(weight, "ds_id") for weight in weights):
        raise NotImplementedError(DEEPSPEED)


class TensorPart(NamedTuple):
    """Which part of tensor parallel weights a process has.

    Attributes:
        place: the number of the part, from 0.
        ranks: the ranks of the launch that have all parts together, in the order of the parts.
        group: their process group.
    """

    place: int
    ranks: tuple[int, ...]
    group: Any


def tensor_part(model: nn.Module) -> TensorPart | None:
    """The part of the weights that this process has under a tensor parallel plan; None without one.

    Plans of Transformers and of `torch.distributed.tensor.parallel` are known.
    """
    size = getattr(model, "_tp_size", None) or 1
    if size > 1:
        mesh = getattr(model, "_device_mesh", None)
        if mesh is not None and "tp" in (mesh.mesh_dim_names or ()):
            mesh = mesh["tp"]
    elif is_sharded(model) and not _is_fsdp(model):
        mesh = next(p.device_mesh for p in model.parameters() if hasattr(p, "device_mesh"))
    else:
        return None
    if mesh is None or mesh.ndim != 1:
        return TensorPart(-1, (), None)
    return TensorPart(mesh.get_local_rank(), tuple(mesh.mesh.flatten().tolist()), mesh.get_group())


def refuse_placement(model: nn.Module, averaged: bool, members: Any = None, dense_heads: bool = False) -> None:
    """Refuse weights that lie where several ranks cannot use them.

    Args:
        averaged, members: `averaged` and `group` of `context_parallel`.
        dense_heads: whether options number the heads of a layer.

    Raises:
        NotImplementedError: tensor parallel weights without `members` that have the same part of them or with
            `dense_heads`, or a model spread over several devices of one rank.
        ValueError: weights that FSDP2 has sharded, without `averaged`.
    """
    name, spread = type(model).__name__, devices_of(getattr(model, "hf_device_map", None))
    part = tensor_part(model)
    if part is not None:
        given = isinstance(members, dist.ProcessGroup)
        own = set(dist.get_process_group_ranks(members)) if given else set()
        if not part.ranks or len(own & set(part.ranks)) != 1:
            raise NotImplementedError(
                f"the weights of {name} are sharded by a tensor parallel plan over ranks {list(part.ranks)}, and a "
                "prompt can be shared by ranks with the same part of the weights only: pass their process group, "
                "group=..., or load the model without a plan and shard it by FSDP2."
            )
        if dense_heads:
            raise NotImplementedError(
                f"dense_heads numbers the key heads of a whole layer, and a rank of {name} has some of them under its "
                "tensor parallel plan: leave dense_heads out, or load the model without a plan."
            )
    if len(spread) > 1:
        raise NotImplementedError(
            f"{name} is spread over {', '.join(spread)} in one rank: load it with a device_map of one device, the rest "
            "on cpu or disk, or start one process per device."
        )
    if is_sharded(model) and _is_fsdp(model) and not averaged:
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
