"""Route the `scaled_dot_product_attention` calls made inside one model to our kernels, where no registry is asked."""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_attn_plugins.core.compat import multihead_attention_with
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.hf.models.evaluating import evaluating
from hf_attn_plugins.kernels.attend import attend
from hf_attn_plugins.plugins import plugin
from hf_attn_plugins.testing import closeness

_SDPA = torch.nn.functional.scaled_dot_product_attention
_MHA: Any = torch.nn.functional.multi_head_attention_forward
Function = Callable[..., Tensor]
EXACT = "tiled_attention"


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    method: Callable[..., Partial] | None = None,
) -> Tensor:
    """PyTorch's function of the same name by our kernels; arguments, shapes and result as there.

    Args:
        query: (..., Hq, T, D), or (B, T, D) without heads.
        key, value: (..., Hkv, S, D or Dv), Hkv being Hq or 1, or with `enable_gqa` a divisor of Hq.
        attn_mask: bool (True = attend) or float, broadcastable to (..., Hq, T, S).
        is_causal: row t sees keys 0 .. t, aligned to the top left as PyTorch does.
        method: a plugin's attention for the causal calls, its options bound; None for the kernels themselves.

    Raises:
        ValueError: a mask beside is_causal, or shapes that do not fit.
    """
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask and is_causal=True exclude each other.")
    if query.ndim < 3:
        raise ValueError(f"query is {tuple(query.shape)}: at least (batch, tokens, head_dim) is needed.")
    headless = query.ndim == 3
    if headless:  # every row of the batch has one
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
        attn_mask = attn_mask.unsqueeze(1) if attn_mask is not None and attn_mask.ndim == 3 else attn_mask
    leading = torch.broadcast_shapes(*(x.shape[:-3] for x in (query, key, value)))
    if attn_mask is not None and len(leading) > 1:
        attn_mask = attn_mask.reshape((1,) * (query.ndim - attn_mask.ndim) + attn_mask.shape)
        attn_mask = attn_mask.expand(*leading, *attn_mask.shape[-3:]).flatten(0, len(leading) - 1)
    query, key, value = (x.expand(*leading, *x.shape[-3:]).flatten(0, len(leading) - 1) for x in (query, key, value))
    if not enable_gqa and key.shape[1] not in (1, query.shape[1]):
        raise ValueError(f"query has {query.shape[1]} heads, key {key.shape[1]}: pass enable_gqa=True to share them.")
    if is_causal and method is not None:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        mask = Mask(causal=True, offset=0)
        out = method(query, key, value, mask, scale=scale, softcap=None, dropout=dropout_p).out
    else:
        mask_or_tensor = Mask(causal=True, offset=0) if is_causal else attn_mask
        out = attend(query, key, value, mask=mask_or_tensor, scale=scale, dropout=dropout_p).out
    return out.squeeze(1) if headless else out.unflatten(0, leading)


class _Route(TorchFunctionMode):
    def __init__(self, function: Function) -> None:
        super().__init__()
        # nn.MultiheadAttention's own function calls SDPA by a global name, out of the mode's sight.
        copy = multihead_attention_with(function)
        self.routes: dict[Any, Any] = {_SDPA: function, _MHA: copy}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        return self.routes.get(func, func)(*args, **(kwargs or {}))


class _Scopes(threading.local):
    """The routes that this thread is in, a model inside itself included."""

    def __init__(self) -> None:
        self.open: list[contextlib.ExitStack] = []

    def __reduce__(self) -> tuple[type[_Scopes], tuple[()]]:
        return _Scopes, ()


class Interception:
    """A model whose attention calls are routed; `undo()` takes it back, as does leaving it as a context manager.

    Attributes:
        calls: calls of one forward pass on the sample, all of which were found equal.
    """

    def __init__(self, model: nn.Module, function: Function, calls: int) -> None:
        self.model, self.calls, self._function, self._scopes = model, calls, function, _Scopes()
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
        stack.enter_context(_Route(self._function))
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
        name: an exact plugin; the approximate ones need to know a call's place in the text, which SDPA does not say.
        sample: keyword inputs (or the one positional tensor) for the check; None draws 16 token ids.

    Returns:
        The `Interception`.

    Raises:
        ValueError: an unknown or approximate plugin, a model that makes no such call, a sample that is needed and was
            not given, or results that are not equal by the error rule; the model is as it was then.
    """
    chosen = plugin(name)
    if not chosen.exact:
        raise ValueError(
            f"{name} is not exact, and SDPA calls do not say where in the sequence they are: use an exact one."
        )
    method = None
    if name != EXACT:
        method = functools.partial(chosen.attention(), options=chosen.options_type()())
    function = functools.partial(scaled_dot_product_attention, method=method)
    calls = _check(model, function, sample)
    if calls == 0:
        raise ValueError(
            f"{type(model).__name__} makes no scaled_dot_product_attention call in its forward pass: there is "
            "nothing to route. Its attention is written out in products; load it with attn_implementation='sdpa' "
            "if it has that."
        )
    return Interception(model, function, calls)


def _check(model: nn.Module, function: Function, sample: Mapping[str, Any] | Tensor | None) -> int:
    """Run the sample once, doing every call both ways; returns how many there were."""
    calls = 0

    def both(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        theirs = _SDPA(query, key, value, *args, **kwargs)
        dropout = kwargs.get("dropout_p", args[1] if len(args) > 1 else 0.0)
        if dropout == 0.0:
            ours = function(query, key, value, *args, **kwargs)
            args, kwargs = _wide(args), dict(zip(kwargs, _wide(tuple(kwargs.values()))))
            ref = _SDPA(query.double(), key.double(), value.double(), *args, **kwargs)
            # A row that sees no key is a matter of convention: PyTorch's kernels give 0, a mean or NaN.
            seen = theirs.isfinite() & ref.isfinite()
            low, ref = theirs.where(seen, 0), ref.where(seen, 0)
            wrong = closeness(ours.where(seen, 0), low, ref)
            if wrong is not None:
                raise ValueError(
                    f"the sample's calls are not equal, nothing was routed: attention call {calls}: {wrong}."
                )
            calls += 1
        return theirs

    with torch.no_grad(), evaluating(model), _Route(both):
        _run(model, sample)
    return calls


def _wide(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in values)


def _run(model: Any, sample: Mapping[str, Any] | Tensor | None) -> None:
    if isinstance(sample, Tensor):
        model(sample)
    elif sample is not None:
        model(**sample)
    else:
        config: Any = getattr(model, "config", None)
        vocabulary = (
            getattr(config.get_text_config(), "vocab_size", None) if hasattr(config, "get_text_config") else None
        )
        if vocabulary is None:
            raise ValueError(
                f"no token ids can be drawn for {type(model).__name__}: pass sample=, the inputs of one call."
            )
        device = next(model.parameters()).device
        model(torch.randint(0, vocabulary, (1, 16), generator=torch.Generator().manual_seed(0)).to(device))


__all__ = ["Interception", "intercept", "scaled_dot_product_attention"]
