"""The Transformers model inside what training scripts wrap around it."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_attn_plugins.core.compat import inside_compiled


def unwrapped(model: Any) -> Any:
    """The model inside DistributedDataParallel, DataParallel, torch.compile, DeepSpeed or PEFT wrappers.

    A model that carries no wrapper is returned as it is, whatever its class.

    Raises:
        TypeError: no torch module at all.
        ValueError: a wrapper without which the model inside cannot run: FullyShardedDataParallel, whose wrapper gathers
            the weights, and PEFT's prompt learning, whose wrapper adds the prompt.
    """
    while True:
        if not isinstance(model, nn.Module):
            raise TypeError(f"a model is needed, such as a transformers.PreTrainedModel, got {type(model).__name__}.")
        inner = _inside(model)
        if inner is None or inner is model:
            return model
        model = inner


def language_model(model: Any) -> Any:
    """`unwrapped(model)`, where it is a model of Transformers.

    Raises:
        ValueError: it is none; the message says what to pass.
    """
    inner = unwrapped(model)
    if not hasattr(inner, "set_attn_implementation") or not hasattr(inner, "config"):
        parts = [name for name, child in inner.named_children() if hasattr(child, "set_attn_implementation")]
        where = f", for example model.{parts[0]}" if parts else ""
        raise ValueError(f"{type(inner).__name__} is no model of Transformers: pass the PreTrainedModel inside{where}.")
    return inner


def _inside(model: nn.Module) -> nn.Module | None:
    """What one wrapper holds; None for a model without a wrapper.

    Classes are recognised by name, so that no optional package is imported for the question.
    """
    names = {f"{kind.__module__.split('.')[0]}.{kind.__name__}" for kind in type(model).__mro__}
    if "torch.FullyShardedDataParallel" in names:
        raise ValueError(
            "FullyShardedDataParallel gathers a model's weights in its own forward: pass model.module inside "
            "`with FullyShardedDataParallel.summon_full_params(model):`, or shard with fully_shard."
        )
    if names & {"torch.DistributedDataParallel", "torch.DataParallel", "deepspeed.DeepSpeedEngine"}:
        return _module(model, "module")
    if "torch.OptimizedModule" in names:
        return inside_compiled(model)
    if names & {"peft.PeftModel", "peft.PeftMixedModel"}:
        chosen = getattr(model, "active_peft_config", None)
        if getattr(chosen, "is_prompt_learning", False):
            raise ValueError(
                f"{type(model).__name__} adds a learned prompt outside of the model: pass model.get_base_model() to "
                "leave the prompt out."
            )
        return model.get_base_model()  # type: ignore[operator]
    return None


def _module(model: nn.Module, name: str) -> nn.Module:
    found = getattr(model, name)
    if not isinstance(found, nn.Module):
        raise ValueError(f"{type(model).__name__}.{name} is no module: pass the model itself.")
    return found
