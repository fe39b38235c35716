"""A model's own forward on the meta device: which attention calls it makes, at no cost in memory or arithmetic.

Reading a model's source says what it might do; this runs it. Weights are replaced by meta tensors for the one call
(`torch.func.functional_call`), so a loaded model stays as it is. Code that looks at values cannot run on the meta
device: what was seen until then still counts.
"""

from __future__ import annotations

import contextlib
import inspect
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.core.compat import swap_forward_hooks
from hf_attn_plugins.core.decision import Decision
from hf_attn_plugins.hf import compat
from hf_attn_plugins.hf.calls import recorder
from hf_attn_plugins.hf.models.configs import configs_of

TOKENS = 16  # of a run whose length was not asked for


@dataclass(frozen=True)
class DryRun:
    """What a dry run saw.

    Attributes:
        calls: the attention calls as (module, decision), in order.
        refusal: the plugin's own error, which a real forward would raise; None where there was none.
        unfinished: why the run ended early for another reason; None where it did not.
    """

    calls: tuple[tuple[nn.Module, Decision], ...]
    refusal: str | None = None
    unfinished: str | None = None


def dry_run(model: nn.Module, name: str, length: int | None = None) -> DryRun:
    """Run `model` once under attention `name` on the meta device.

    Args:
        model: any `transformers.PreTrainedModel`, on any device.
        name: a plugin.
        length: tokens of the prompt; a few when None.
    """
    inputs = _inputs(model, length or TOKENS)
    if inputs is None:
        return DryRun((), unfinished="no inputs are known for this kind of model")
    if any(compat.moves_weights(module) for module in model.modules()):
        return DryRun((), unfinished="hooks move this model's weights between devices")
    state: dict[str, Tensor] = {
        key: torch.empty_like(x, device="meta", requires_grad=False)
        for key, x in (*model.named_parameters(), *model.named_buffers())
    }
    seen: list[tuple[nn.Module, Decision]] = []
    refusal = unfinished = None
    with _named(model, name), _without_hooks(model), recorder.watched(model, seen), torch.no_grad():
        try:
            torch.func.functional_call(model, state, (), inputs)
        except Exception as error:
            text = " ".join(str(error).split())
            if "hf_attn_plugins" in traceback.extract_tb(error.__traceback__)[-1].filename and not _about_meta(error):
                refusal = text
            else:
                unfinished = f"{type(error).__name__}: {text[:200]}"
    return DryRun(tuple(seen), refusal, unfinished)


def _about_meta(error: Exception) -> bool:
    return not isinstance(error, ValueError | NotImplementedError) or "meta" in str(error).lower()


@contextlib.contextmanager
def _named(model: nn.Module, name: str) -> Iterator[None]:
    """The model's configs with another attention name for a while. Nothing is checked: the run is the check."""
    configs = configs_of(model)
    before = [compat.implementation_of(config) for config in configs]
    for config in configs:
        compat.set_implementation(config, name)
    try:
        yield
    finally:
        for config, old in zip(configs, before, strict=True):
            compat.set_implementation(config, old)


@contextlib.contextmanager
def _without_hooks(model: nn.Module) -> Iterator[None]:
    """A model without the hooks that others registered on it: a dry run must not be seen by them."""
    modules = list(model.modules())
    before = [swap_forward_hooks(module) for module in modules]
    try:
        yield
    finally:
        for module, hooks in zip(modules, before, strict=True):
            swap_forward_hooks(module, hooks)


def _inputs(model: Any, length: int) -> dict[str, Any] | None:
    """Meta tensors for a forward of this kind of model; None where its inputs are not known."""
    config, main = getattr(model, "config", None), getattr(model, "main_input_name", "input_ids")
    ids = torch.zeros(1, length, dtype=torch.long, device="meta")
    if main == "input_ids":
        given: dict[str, Any] = {"input_ids": ids}
        if getattr(config, "is_encoder_decoder", False):
            given["decoder_input_ids"] = ids
    elif main == "pixel_values":
        vision = getattr(config, "vision_config", None) or config
        size, channels = getattr(vision, "image_size", None), getattr(vision, "num_channels", 3)
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
        given = {main: torch.zeros(1, channels, height, width, device="meta", dtype=_dtype(model))}
    else:
        return None
    accepted = _arguments(model)
    if "use_cache" in accepted:
        given["use_cache"] = True  # without a cache, packed prompts are looked for, which reads values
    return given


def _arguments(model: nn.Module) -> set[str]:
    """Names of the arguments of a model's forward."""
    return set(inspect.signature(model.forward).parameters)


def _dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
