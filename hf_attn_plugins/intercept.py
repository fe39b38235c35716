"""Route the `scaled_dot_product_attention` calls made inside one model to our kernels, for models that ask no registry."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_attn_plugins.kernels import attend
from hf_attn_plugins.masks import Mask
from hf_attn_plugins.registry import plugin
from hf_attn_plugins.testing import assert_close_to_reference

_SDPA = torch.nn.functional.scaled_dot_product_attention
Function = Callable[..., Tensor]


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """PyTorch's function of the same name by our kernels; arguments, shapes and result as there.

    Args:
        query: (..., Hq, T, D); key, value: (..., Hkv, S, D or Dv), Hkv = Hq unless `enable_gqa`; (B, T, D) has no heads.
        attn_mask: bool (True = attend) or float, broadcastable to (..., Hq, T, S).
        is_causal: row t sees keys 0 .. t, aligned to the top left as PyTorch does.

    Raises:
        ValueError: a mask beside is_causal, or shapes that do not fit.
    """
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask and is_causal=True exclude each other.")
    leading = query.shape[:-3]
    if query.ndim == 3:  # no heads: every row of the batch is one
        leading, (query, key, value) = query.shape[:1], tuple(x.unsqueeze(1) for x in (query, key, value))
        attn_mask = attn_mask.unsqueeze(1) if attn_mask is not None and attn_mask.ndim == 3 else attn_mask
        shape = (*leading, query.shape[-2], value.shape[-1])
    else:
        shape = (*query.shape[:-1], value.shape[-1])
    if attn_mask is not None and len(leading) > 1:
        attn_mask = attn_mask.expand(*leading, *torch.broadcast_shapes(attn_mask.shape, (1, 1, 1))[-3:])
        attn_mask = attn_mask.flatten(0, len(leading) - 1)
    query, key, value = (x.reshape(-1, *x.shape[-3:]) for x in (query, key, value))
    if not enable_gqa and query.shape[1] != key.shape[1]:
        raise ValueError(f"query has {query.shape[1]} heads, key {key.shape[1]}: pass enable_gqa=True to share them.")
    mask = Mask(causal=True, offset=0) if is_causal else attn_mask
    return attend(query, key, value, mask=mask, scale=scale, dropout=dropout_p).out.view(shape)


class _Route(TorchFunctionMode):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        return (self.function if func is _SDPA else func)(*args, **(kwargs or {}))


class _Scopes(threading.local):
    """The routes that this thread is in, a model inside itself included."""

    def __init__(self) -> None:
        self.open: list[contextlib.ExitStack] = []


class Interception:
    """A model whose attention calls are routed; `undo()` takes it back, as does leaving it as a context manager.

    Attributes:
        calls: calls of one forward pass on the sample, all of which were found equal.
    """

    def __init__(self, model: nn.Module, calls: int) -> None:
        self.model, self.calls, self._scopes = model, calls, _Scopes()
        self._hooks = [
            model.register_forward_pre_hook(self._enter),
            model.register_forward_hook(self._leave, always_call=True),
        ]

    def undo(self) -> None:
        """Route nothing any more; without effect the second time."""
        while self._hooks:
            self._hooks.pop().remove()

    def __enter__(self) -> Interception:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def _enter(self, module: nn.Module, args: Any) -> None:
        stack = contextlib.ExitStack()
        stack.enter_context(_Route(scaled_dot_product_attention))
        self._scopes.open.append(stack)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._scopes.open:
            self._scopes.open.pop().close()


def intercept(
    model: nn.Module, name: str = "tiled_attention", sample: Mapping[str, Any] | Tensor | None = None
) -> Interception:
    """Let an exact plugin do the `scaled_dot_product_attention` calls that a model makes in its forward pass.

    For models whose code never asks Transformers' registry (remote code, nn.MultiheadAttention, other libraries). Holds
    until `undo()`, or for the length of a `with` block. Other models of the process, and this model's modules when they
    are called on their own, are untouched: the route is open only while the model's own forward runs, in its thread.

        with hap.intercept(model, "tiled_attention"):
            model.generate(...)

    Args:
        model: any module, in whose forward pass the calls are.
        name: an exact plugin; the approximate ones need to know a call's place in the sequence, which SDPA does not say.
        sample: keyword inputs (or the one positional tensor) for the check; None draws 16 token ids.

    Returns:
        The `Interception`.

    Raises:
        ValueError: an unknown or approximate plugin, a model that makes no such call, a sample that is needed and was not
            given, or results that are not equal by the error rule; the model is as it was then.
    """
    chosen = plugin(name)
    if not chosen.exact:
        raise ValueError(f"{name} is not exact, and SDPA calls do not say where in the sequence they are: use an exact one.")
    calls = _check(model, sample)
    if calls == 0:
        raise ValueError(
            f"{type(model).__name__} makes no scaled_dot_product_attention call in its forward pass: there is nothing to "
            "route. Its attention is written out in matrix products; load it with another implementation if it has one."
        )
    return Interception(model, calls)


def _check(model: nn.Module, sample: Mapping[str, Any] | Tensor | None) -> int:
    """Run the sample once, doing every call both ways; returns how many there were."""
    calls = 0

    def both(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        theirs = _SDPA(query, key, value, *args, **kwargs)
        dropout = kwargs.get("dropout_p", args[1] if len(args) > 1 else 0.0)
        if dropout == 0.0:
            ours = scaled_dot_product_attention(query, key, value, *args, **kwargs)
            args, kwargs = _wide(args), dict(zip(kwargs, _wide(tuple(kwargs.values()))))
            ref = _SDPA(query.double(), key.double(), value.double(), *args, **kwargs)
            # A row that sees no key is a matter of convention: PyTorch's kernels give 0, a mean or NaN.
            seen = theirs.isfinite() & ref.isfinite()
            low, ref = theirs.where(seen, 0), ref.where(seen, 0)
            try:
                assert_close_to_reference(ours.where(seen, 0), low, ref, name=f"attention call {calls}")
            except AssertionError as error:
                raise ValueError(f"the sample's calls are not equal, nothing was routed: {error}.") from error
            calls += 1
        return theirs

    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _Route(both):
            _run(model, sample)
    finally:
        model.train(training)
    return calls


def _wide(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values)


def _run(model: Any, sample: Mapping[str, Any] | Tensor | None) -> None:
    if isinstance(sample, Tensor):
        model(sample)
    elif sample is not None:
        model(**sample)
    else:
        config = getattr(model, "config", None)
        vocabulary = getattr(config.get_text_config(), "vocab_size", None) if hasattr(config, "get_text_config") else None
        if vocabulary is None:
            raise ValueError(f"no token ids can be drawn for {type(model).__name__}: pass sample=, the inputs of one call.")
        device = next(model.parameters()).device
        model(torch.randint(0, vocabulary, (1, 16), generator=torch.Generator().manual_seed(0)).to(device))


__all__ = ["Interception", "intercept", "scaled_dot_product_attention"]
