"""Training on shards beside the same loop in one process."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import torch
from torch import Tensor

import hf_attn_plugins as hap
from hf_attn_plugins.testing import closeness
from tests.parallel.cases import one_process
from tests.parallel.cqs_cases import error_of
from tests.parallel.models import build, prompt

_TO = torch.Tensor.to
LOW_AND_EXACT = (torch.bfloat16, torch.float64)


def to_in_float64(tensor: Tensor, *args: Any, **options: Any) -> Tensor:
    """`Tensor.to` that leaves float64 what a norm would round to float32: copies of a row are rounded apart."""
    return tensor if tensor.dtype == torch.float64 and args[:1] == (torch.float32,) else _TO(tensor, *args, **options)


@mock.patch.object(torch.Tensor, "float", torch.Tensor.double)  # norms and loss in float64, too: no rounding to hide in
@mock.patch.object(torch.Tensor, "to", to_in_float64)
def train(
    rank: int,
    size: int,
    name: str = "cqs_attention",
    family: str = "llama",
    options: dict[str, Any] | None = None,
    length: int = 29,
    padding: int = 0,
    side: str = "right",
    steps: int = 3,
    checkpointing: bool = False,
    accumulate: int = 1,
    items: int | None = None,
    packed: bool = False,
    frozen: bool = False,
    lora: bool = False,
    dropout: float = 0.0,
) -> dict[str, Any]:
    """A Trainer-style loop on shards beside the same loop in one process: losses, gradients and parameters."""
    found, wanted = (copy.deepcopy(build(family)).train() for _ in range(2))
    if lora:
        for model in (found, wanted):
            add_lora(model)
    if frozen:  # the first layer's keys require no gradient
        for model in (found, wanted):
            for label, parameter in model.named_parameters():
                parameter.requires_grad_("q_proj" in label or "v_proj" in label)
    for model in (found, wanted):
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = dropout
    before = {label: p.detach().clone() for label, p in wanted.named_parameters()}
    if checkpointing:
        found.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [
        _batch(length, padding, side, seed, packed, name == "star_attention") for seed in range(steps * accumulate)
    ]
    extra = {} if items is None else {"num_items_in_batch": items}
    losses, gradients = [], []
    torch.manual_seed(100 + rank)  # rank 0's generator decides
    state = torch.get_rng_state()
    with hap.context_parallel(found, name, timeout=30, **(options or {})) as cp:
        state = cp.group.objects(state)[0]
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
    torch.set_rng_state(state)
    optimizer = torch.optim.AdamW(wanted.parameters(), lr=0.01)
    errors = {"loss": 0.0, "gradient": 0.0, "parameter": 0.0}
    with one_process(wanted, name, options or {}) if name == "star_attention" else hap.use(wanted, "tiled_attention"):
        for step in range(steps):
            for index in range(step * accumulate, (step + 1) * accumulate):
                loss = wanted(**batches[index], **extra).loss
                errors["loss"] = max(errors["loss"], abs(loss.item() - losses[index]))
                loss.backward()
            for name, gradient in _gradients(wanted).items():
                errors["gradient"] = max(errors["gradient"], error_of(gradients[step][name], gradient))
            assert gradients[step].keys() == _gradients(wanted).keys()
            torch.nn.utils.clip_grad_norm_(wanted.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    for (name, mine), theirs in zip(found.named_parameters(), wanted.parameters(), strict=True):
        assert mine.shape == theirs.shape, name
        errors["parameter"] = max(errors["parameter"], error_of(mine.detach(), theirs.detach()))
    moved = max(error_of(p.detach(), before[label]) for label, p in wanted.named_parameters())
    return {**report, "errors": errors, "moved": moved, "losses": losses}


class LoRA(torch.nn.Module):
    """A frozen linear layer, and the product of two small matrices that learn: arXiv 2106.09685."""

    def __init__(self, base: torch.nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        generator = torch.Generator().manual_seed(base.out_features)
        for name, size in (("down", (rank, base.in_features)), ("up", (base.out_features, rank))):
            start = torch.randn(size, generator=generator, dtype=base.weight.dtype) / 4
            setattr(self, name, torch.nn.Parameter(start))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.mT @ self.up.mT


def add_lora(model: Any) -> None:
    """LoRA on queries and values; all other weights are frozen."""
    model.requires_grad_(False)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            setattr(layer.self_attn, name, LoRA(getattr(layer.self_attn, name)))


def rounded(
    rank: int, size: int, name: str, options: dict[str, Any] | None = None, family: str = "llama", dropout: float = 0.0
) -> dict[str, Any]:
    """Loss and gradients of one batch in bfloat16: where the error rule does not hold, and the largest ratio of errors.

    The reference is one process in float64 with the weights of bfloat16, "low" is one process in bfloat16.
    """
    batch = _batch(61, 7, "right", 3, star=name == "star_attention")

    def learn(dtype: torch.dtype, session: Any) -> dict[str, Tensor]:
        model = copy.deepcopy(build(family, "bfloat16")).to(dtype).train()
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = dropout
        torch.manual_seed(5)
        with session(model) as cp:
            loss = model(**batch).loss
            loss.backward()
            if hasattr(cp, "sum_gradients"):
                cp.sum_gradients()
        return {"loss": loss.detach().to(dtype).reshape(1), **_gradients(model)}

    found = learn(torch.bfloat16, lambda model: hap.context_parallel(model, name, timeout=30, **(options or {})))
    low, reference = (learn(dtype, lambda model: one_process(model, name, options or {})) for dtype in LOW_AND_EXACT)
    broken = {key: closeness(x, low[key], reference[key], 3.0) for key, x in found.items()}
    errors = [[error_of(x[key].double(), reference[key]) for key in reference] for x in (found, low)]
    return {
        "broken": [f"{key}: {text}" for key, text in broken.items() if text],
        "share": sum(map(sum, errors[:1])) / sum(map(sum, errors[1:])),
        "compared": len(reference),
    }


def _batch(length: int, padding: int, side: str, seed: int, packed: bool = False, star: bool = False) -> dict[str, Any]:
    batch: dict[str, Any] = prompt(length, 2, padding, side, seed)
    labels = torch.where(batch["attention_mask"].bool(), batch["input_ids"], -100)
    labels[0, 3:7] = -100
    if star and side == "left":  # the first token behind padding is predicted by padding, which star does not compute
        labels[torch.arange(2), batch["attention_mask"].argmax(1)] = -100
    if packed:  # three texts in a row, the second of one token
        del batch["attention_mask"]
        starts = torch.tensor([[0, 11, 12], [0, 3, 20]])
        places = torch.arange(length).expand(2, -1)
        batch["position_ids"] = places - torch.where(places[..., None] >= starts[:, None], starts[:, None], 0).amax(-1)
        batch["use_cache"] = False
    return {**batch, "labels": labels}


def _gradients(model: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def refused(rank: int, size: int, whats: list[str]) -> dict[str, str]:
    """The messages of calls that cannot work on several ranks."""
    return {what: _refused(size, what) for what in whats}


def _refused(size: int, what: str) -> str:
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
    if what == "attention dropout in a later turn":
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
    if what == "dropout":
        model.config.hidden_dropout = 0.1
    if what == "padding":
        batch = _batch(12, 3, "left", 0)
    name = "star_attention" if what == "padding" else "cqs_attention"
    try:
        with hap.context_parallel(model, name, timeout=30, **options):
            if "later turn" in what:
                model.generate(batch["input_ids"], max_new_tokens=2)
            model(**batch)
    except (ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was refused"
