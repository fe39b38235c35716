"""Tensor parallel weights beside context parallelism: a 2 x 2 mesh of context and tensor ranks."""

from __future__ import annotations

import copy
import tempfile
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import hf_attn_plugins as hap
from tests.parallel import train_cases
from tests.parallel.cases import one_process
from tests.parallel.models import build, prompt

CUTS: dict[str, Any] = {
    **{f"model.layers.*.self_attn.{name}_proj": ColwiseParallel() for name in "qkv"},
    **{f"model.layers.*.mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")},
    "model.layers.*.self_attn.o_proj": RowwiseParallel(),
    "model.layers.*.mlp.down_proj": RowwiseParallel(),
}


def meshes() -> DeviceMesh:
    """Ranks 0 1 and 2 3 have all weights together; 0 2 and 1 3 have the same part of them."""
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("context", "tensor"))


def cut_by_torch(mesh: DeviceMesh, family: str) -> Any:
    """The weights cut by PyTorch."""
    return parallelize_module(copy.deepcopy(build(family)), mesh["tensor"], CUTS)


def cut_by_transformers(family: str, **sizes: int) -> Any:
    """The weights cut by Transformers, while they are loaded."""
    from transformers.distributed import DistributedConfig

    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(folder, 0)
    if dist.get_rank() == 0:
        build(family).save_pretrained(folder[0])
    dist.barrier()
    return type(build(family)).from_pretrained(
        folder[0], distributed_config=DistributedConfig(**sizes), dtype=torch.float64
    )


def generate(
    rank: int, size: int, name: str, options: dict[str, Any] | None = None, family: str = "llama", **sizes: int
) -> dict[str, Any]:
    """Logits and tokens of a session over ranks with the same part of the weights, beside one process."""
    mesh, whole, options = meshes(), build(family), options or {}
    model = cut_by_transformers(family, **sizes) if sizes else cut_by_torch(mesh, family)
    inputs, arguments = prompt(23, 2, padding=4), dict(max_new_tokens=6, do_sample=True, top_k=20)
    real = inputs["attention_mask"].bool()
    torch.manual_seed(rank)
    group = mesh["context"].get_group()
    with hap.context_parallel(model.eval(), name, group=group, averaged=True, timeout=30, **options) as cp:
        state = [torch.get_rng_state()]
        found = model.generate(**inputs, **arguments)
        with torch.no_grad():
            logits = model(**inputs).logits
    dist.broadcast_object_list(state, 0)
    torch.set_rng_state(state[0])
    with one_process(whole, name, options), torch.no_grad():
        wanted, reference = whole.generate(**inputs, **arguments), whole(**inputs).logits
    with one_process(whole, "tiled_attention", {}), torch.no_grad():
        dense = whole(**inputs).logits
    return {
        "tokens": found.tolist(),
        "wanted": wanted.tolist(),
        "error": (logits - reference)[real].abs().max().item(),
        "from dense": (dense - reference)[real].abs().max().item(),
        "loads": cp.loads,
        "place": [cp.group.index, cp.rank],
    }


@mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
@mock.patch.object(torch.Tensor, "to", train_cases.to_in_float64)
def train(
    rank: int, size: int, name: str, options: dict[str, Any] | None = None, dropout: float = 0.0, **sizes: int
) -> dict[str, Any]:
    """Loss and gradients of two batches, beside one process."""
    whole, options, mesh = copy.deepcopy(build("llama")).train(), options or {}, meshes()
    model = (cut_by_transformers("llama", **sizes) if sizes else cut_by_torch(mesh, "llama")).train()
    for module in (*whole.modules(), *model.modules()):
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = dropout
    batches = [train_cases._batch(29, 3, "right", seed, star=True) for seed in range(2)]
    averaged, losses, errors = bool(sizes), [], []
    torch.manual_seed(7 + rank)
    group = mesh["context"].get_group()
    with hap.context_parallel(model, name, group=group, averaged=averaged, timeout=30, **options) as cp:
        for batch in batches:
            loss = model(**batch).loss
            loss.backward()
            losses.append(loss.item())
        if not averaged:
            cp.sum_gradients()
    torch.manual_seed(7)
    with one_process(whole, name, options):
        for batch, found in zip(batches, losses, strict=True):
            loss = whole(**batch).loss
            loss.backward()
            errors.append(abs(loss.item() - found))
    for mine, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        found = mine.grad.full_tensor() if hasattr(mine.grad, "full_tensor") else mine.grad
        errors.append((found - theirs.grad).abs().max().item())
    return {"error": max(errors), "losses": losses}


def refused(rank: int, size: int) -> dict[str, str]:
    """What does not run with tensor parallel weights."""
    mesh = meshes()
    model, whole = cut_by_torch(mesh, "llama"), build("llama")
    context, tensor = (mesh[name].get_group() for name in ("context", "tensor"))
    ids = prompt(23, 1)["input_ids"]

    def opened(model: Any, name: str = "tiled_attention", **options: Any) -> str:
        try:
            with hap.context_parallel(model, name, timeout=30, **options):
                model(input_ids=ids, labels=ids)
        except (ValueError, NotImplementedError) as error:
            return str(error)
        return "nothing was refused"

    def batches() -> str:
        with hap.context_parallel(model, "tiled_attention", group=context, timeout=30) as cp:
            try:
                cp.same_batches([])
            except ValueError as error:
                return str(error)
        return "nothing was refused"

    uneven = dist.new_group([0, 1, 2])
    found = {
        "no group": opened(model),
        "the other parts": opened(model, group=tensor),
        "batches": batches(),
        "heads": opened(model, "star_attention", group=context, dense_heads=[[0], []]),
        "both": opened(whole, group=context, ranks=2),
        "no process group": opened(whole, group="context"),
        "uneven": opened(whole, group=uneven if rank < 3 else dist.group.WORLD),
    }
    return found
