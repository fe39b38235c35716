"""What the ranks do in the tests of CQS over ranks: functions of (rank, size, ...) that return JSON-ready values."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import hf_attn_plugins as hap
from hf_attn_plugins.commands.bench import parallel_rank
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.parallel import Group, cqs_exchange
from hf_attn_plugins.parallel.cqs_plan import rank_plan
from hf_attn_plugins.testing import dense_attention, sharp_inputs, visibility
from tests.parallel.models import build, prompt


def exchange(
    rank: int, size: int, tokens: int, workers: int | None, is_causal: bool, rounds: int, padding: int
) -> dict[str, Any]:
    """Attention of shards on a real group against dense attention over everything: errors, and bytes counted."""
    plan = rank_plan(tokens, size, workers, None, is_causal, rounds)
    whole = sharp_inputs(2, 4, 2, tokens, tokens, 6, 5, dtype=torch.float64, seed=tokens)
    real = torch.ones(2, tokens, dtype=torch.bool)
    real[1, :padding] = False
    seen = visibility(tokens, tokens, is_causal=is_causal, key_padding=real)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(2, 4, tokens, 5, generator=generator, dtype=torch.float64)
    grad_lse = torch.randn(2, 4, tokens, generator=generator, dtype=torch.float64) * seen.any(-1)
    shard = slice(*plan.shards[rank])
    mine = [x[:, :, shard].clone().requires_grad_() for x in whole]
    group = Group.join(timeout=30)
    mask = Mask(causal=is_causal, key_padding=real)
    out, lse = cqs_exchange.attention(*mine, plan, group, mask=mask)
    grads = torch.autograd.grad([out, lse], mine, [grad_out[:, :, shard], grad_lse[:, :, shard]])
    traffic = group.traffic.as_dict()
    group.leave()
    for x in whole:
        x.requires_grad_()
    ref, ref_lse = dense_attention(*whole, seen)
    finite = torch.where(seen.any(-1), ref_lse, 0)
    expected = [ref, ref_lse, *torch.autograd.grad([ref, finite], whole, [grad_out, grad_lse])]
    return {"errors": [_error(a, b[:, :, shard]) for a, b in zip([out, lse, *grads], expected)], "traffic": traffic}


def _error(found: Tensor, wanted: Tensor) -> float:
    difference = torch.where(found == wanted, 0, (found - wanted).abs())
    return difference.nan_to_num(torch.inf).max().item() if found.numel() else 0.0


@mock.patch.object(torch.Tensor, "float", torch.Tensor.double)  # norms and loss in float64, too: no rounding to hide in
def train(
    rank: int,
    size: int,
    family: str = "llama",
    options: dict[str, Any] | None = None,
    length: int = 29,
    padding: int = 0,
    side: str = "right",
    steps: int = 3,
    checkpointing: bool = False,
    accumulate: int = 1,
    items: int | None = None,
) -> dict[str, Any]:
    """A Trainer-style loop on shards beside the same loop in one process: losses, gradients and parameters."""
    found, wanted = (copy.deepcopy(build(family)).train() for _ in range(2))
    if checkpointing:
        found.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [_batch(length, padding, side, seed) for seed in range(steps * accumulate)]
    extra = {} if items is None else {"num_items_in_batch": items}
    losses, gradients = [], []
    with hap.context_parallel(found, "cqs_attention", timeout=30, **(options or {})) as cp:
        optimizer = torch.optim.AdamW(found.parameters(), lr=0.01)
        for step in range(steps):
            for batch in batches[step * accumulate : (step + 1) * accumulate]:
                output = found(**batch, **extra)
                losses.append(output.loss.item())
                output.loss.backward()
            cp.sum_gradients()
            gradients.append(_gradients(found))
            torch.nn.utils.clip_grad_norm_(found.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        columns = None if cp.columns is None else cp.columns.shape[1]
        report = {"rows": output.logits.shape[1], "columns": columns, "traffic": cp.traffic().as_dict()}
    optimizer = torch.optim.AdamW(wanted.parameters(), lr=0.01)
    errors = {"loss": 0.0, "gradient": 0.0, "parameter": 0.0}
    with hap.use(wanted, "tiled_attention"):
        for step in range(steps):
            for index in range(step * accumulate, (step + 1) * accumulate):
                loss = wanted(**batches[index], **extra).loss
                errors["loss"] = max(errors["loss"], abs(loss.item() - losses[index]))
                loss.backward()
            for name, gradient in _gradients(wanted).items():
                errors["gradient"] = max(errors["gradient"], _error(gradients[step][name], gradient))
            assert gradients[step].keys() == _gradients(wanted).keys()
            torch.nn.utils.clip_grad_norm_(wanted.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for (name, mine), theirs in zip(found.named_parameters(), wanted.parameters(), strict=True):
        assert mine.shape == theirs.shape, name
        errors["parameter"] = max(errors["parameter"], _error(mine.detach(), theirs.detach()))
    moved = max(
        _error(a.detach(), b.detach()) for a, b in zip(wanted.parameters(), build(family).parameters(), strict=True)
    )
    return {**report, "errors": errors, "moved": moved, "losses": losses}


def _batch(length: int, padding: int, side: str, seed: int) -> dict[str, Tensor]:
    batch = prompt(length, 2, padding, side, seed)
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    labels[0, 3:7] = -100
    return {**batch, "labels": labels}


def _gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def bench(rank: int, size: int, path: str) -> None:
    """What `hf-attn bench parallel` lets a rank do."""
    parallel_rank.main(Path(path))


def refused(rank: int, size: int, what: str) -> str:
    """The message of a call that cannot work on several ranks."""
    model = copy.deepcopy(build("llama")).train()
    batch = _batch(12, 0, "right", 0)
    options: dict[str, Any] = {}
    if what == "workers":
        options = {"workers": size - 1}
    if what == "rounds":
        options = {"rounds": 9}
    if what == "short":
        batch = {name: x[:, :2] for name, x in batch.items()}
        options = {"workers": 7}
    if what == "packed":
        batch.pop("attention_mask")
        batch["position_ids"] = torch.arange(12).remainder(6).expand(2, -1)
    if what == "loss":
        model.loss_function = lambda **_: 0.0
    name = "star_attention" if what == "star" else "cqs_attention"
    try:
        with hap.context_parallel(model, name, timeout=30, **options):
            model(**batch)
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"
