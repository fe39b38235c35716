"""Training with Trainer, Accelerate's DDP and FSDP2 on shards, and the same in one process."""

from __future__ import annotations

import copy
import os
import tempfile
from typing import Any
from unittest import mock

import torch

import hf_attn_plugins as hap
from examples import train_long
from tests.parallel.cases import one_process
from tests.parallel.cqs_cases import error_of
from tests.parallel.models import build, prompt
from tests.parallel.train_cases import to_in_float64

STEPS = 20


def texts(count: int, length: int = 29) -> list[dict[str, Any]]:
    """Random texts, one of them shorter in labels than the others."""
    ids = [prompt(length, 1, seed=seed)["input_ids"][0] for seed in range(count)]
    return [{"input_ids": x, "labels": torch.where(torch.arange(length) < i % 7, -100, x)} for i, x in enumerate(ids)]


@mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
@mock.patch.object(torch.Tensor, "to", to_in_float64)
def trainer(
    rank: int = 0,
    size: int = 1,
    name: str = "tiled_attention",
    ranks: int | None = None,
    batch: int = 1,
    steps: int = STEPS,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Losses and the sum of the weights after some steps of examples/train_long.py."""
    from transformers import TrainingArguments

    model = copy.deepcopy(build("llama")).train()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=steps, per_device_train_batch_size=batch, gradient_accumulation_steps=2, logging_steps=1,
            learning_rate=0.01, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, seed=3,
            gradient_checkpointing=True,
        )  # fmt: skip
        losses = train_long.train(model, texts(4 * steps), name, arguments, ranks, **(options or {}))
    return {"losses": losses, "weights": [p.double().sum().item() for p in model.parameters()]}


@mock.patch.object(torch.Tensor, "float", torch.Tensor.double)
@mock.patch.object(torch.Tensor, "to", to_in_float64)
def accelerate(
    rank: int, size: int, wrapper: str, name: str = "tiled_attention", options: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Three steps on a 2 x 2 mesh, data x context, beside one process that has both batches.

    `wrapper`: "ddp" by `Accelerator.prepare`; "fsdp2" by PyTorch's `fully_shard`, which Accelerate calls on GPUs.
    """
    from accelerate import Accelerator

    found, wanted = (copy.deepcopy(build("llama")).train() for _ in range(2))
    options, data, losses = options or {}, texts(6), []
    accelerator = Accelerator(cpu=True)
    with hap.context_parallel(found, name, timeout=30, ranks=2, averaged=True, **options) as session:
        if wrapper == "ddp":
            model, optimizer = accelerator.prepare(found, torch.optim.AdamW(found.parameters(), lr=0.01))
        else:
            model = sharded(found)
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for step in range(3):
            item = data[2 * step + session.group.index]
            loss = model(**{key: x[None] for key, x in item.items()}).loss
            accelerator.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        refused = _message(lambda: session.sum_gradients())
    optimizer, errors = torch.optim.AdamW(wanted.parameters(), lr=0.01), []
    with one_process(wanted, name, options):
        for step in range(3):
            each = []
            for item in data[2 * step : 2 * step + 2]:
                loss = wanted(**{key: x[None] for key, x in item.items()}).loss
                (loss / 2).backward()
                each.append(loss.item())
            errors.append(abs(each[session.group.index] - losses[step]))
            torch.nn.utils.clip_grad_norm_(wanted.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for mine, theirs in zip(found.parameters(), wanted.parameters(), strict=True):
        whole = mine.full_tensor() if hasattr(mine, "full_tensor") else mine
        errors.append(error_of(whole.detach(), theirs.detach()))
    return {"error": max(errors), "refused": refused, "group": [session.group.index, session.rank]}


def sharded(model: Any) -> Any:
    """The model's weights sharded by FSDP2 over the whole launch."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def refused(rank: int, size: int) -> dict[str, str]:
    """What `context_parallel` says to launches and models that it does not run."""
    model = build("llama")

    def opened(model: Any, **options: Any) -> str:
        def enter() -> None:
            with hap.context_parallel(model, "tiled_attention", timeout=30, **options):
                pass

        return _message(enter)

    found = {"ranks": opened(model, ranks=3), "none": opened(model, ranks=0)}
    with mock.patch.dict(os.environ, ACCELERATE_USE_DEEPSPEED="true"):
        found["deepspeed"] = opened(model)
    if size > 1:
        found["fsdp"] = opened(sharded(copy.deepcopy(model)))
    return found


def offloaded(rank: int, size: int, name: str) -> dict[str, Any]:
    """Tokens of a model whose weights are loaded layer by layer, and of the model itself; and training, refused."""
    from accelerate import cpu_offload

    model, inputs = build("llama"), prompt(23, 2, padding=4)
    arguments = dict(max_new_tokens=4, do_sample=False)
    away = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    with hap.context_parallel(away, name, timeout=30):
        found = away.generate(**inputs, **arguments)
        away.train()
        message = _message(lambda: away(**inputs, labels=inputs["input_ids"]))
    with one_process(model, name, {}):
        return {"found": found.tolist(), "wanted": model.generate(**inputs, **arguments).tolist(), "train": message}


def _message(call: Any) -> str:
    try:
        call()
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"
