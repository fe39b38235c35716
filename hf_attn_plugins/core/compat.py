"""Every private name of PyTorch (and one of Python's importlib) that this package leans on, behind one function each.

An upgrade that takes a name away fails here, with one sentence. `hf/compat.py` does the same for Transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.functional import multi_head_attention_forward

_TORCH = ("torch", "2.13")  # and the version that everything here was tested with


def needed(owner: Any, name: str, purpose: str, package: str, tested: str) -> Any:
    """The attribute `name` of `owner`.

    Raises:
        NotImplementedError: it is gone; the message names the package, its version, the attribute and what it was for.
    """
    try:
        return getattr(owner, name)
    except AttributeError:
        raise gone(f"`{getattr(owner, '__name__', type(owner).__name__)}.{name}`", purpose, package, tested) from None


def gone(what: str, purpose: str, package: str, tested: str) -> NotImplementedError:
    """The error for a private name that an upgrade of `package` took away."""
    version = getattr(__import__(package), "__version__", "of this version")
    return NotImplementedError(
        f"{package} {version} has no {what}, which hf_attn_plugins needs to {purpose}: "
        f"install {package}=={tested}.* or a newer hf_attn_plugins."
    )


def fused_operator(name: str) -> Callable[..., Any]:
    """One of `torch.ops.aten._scaled_dot_product_*`: fused attention that also returns the lse, or its backward.

    The binding in `torch` is taken where there is one: it is the same operator, some microseconds closer.
    """
    return getattr(torch, name, None) or needed(torch.ops.aten, name, "use PyTorch's fused attention", *_TORCH)


def rng_state_of_flash(rest: tuple[Any, ...] | list[Any]) -> tuple[Any, ...]:
    """What `_scaled_dot_product_flash_attention` returns after (out, lse) and its backward wants back.

    Args:
        rest: the third to last results. The first six are cum_seq_q, cum_seq_k, max_q, max_k and two of the random
            state; a debug mask follows.

    Raises:
        NotImplementedError: there are fewer than six.
    """
    if len(rest) < 6:
        raise gone("`_scaled_dot_product_flash_attention` with eight results", "compute its gradient", *_TORCH)
    return tuple(rest[:6])


def with_globals(function: Any, **replaced: Any) -> FunctionType:
    """A copy of a Python function that sees other values for some of its global names.

    `nn.MultiheadAttention` calls SDPA by a global name, which no mode and no hook sees.

    Raises:
        NotImplementedError: the function does not use a name that is to be replaced, or is no Python function.
    """
    code = getattr(function, "__code__", None)
    missing = [name for name in replaced if code is None or name not in code.co_names]
    if missing:
        raise gone(f"global `{missing[0]}` in `{function.__name__}`", "route its attention elsewhere", *_TORCH)
    inner = {**function.__globals__, **replaced}
    copy = FunctionType(function.__code__, inner, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def multihead_attention_with(sdpa: Callable[..., Any]) -> FunctionType:
    """`F.multi_head_attention_forward` with `sdpa` in place of `F.scaled_dot_product_attention`."""
    return with_globals(multi_head_attention_forward, scaled_dot_product_attention=sdpa)


def default_store() -> Any:
    """The key-value store that the default process group was made with (`distributed_c10d._get_default_store`)."""
    from torch.distributed import distributed_c10d

    return needed(distributed_c10d, "_get_default_store", "tell the other ranks of a failure", *_TORCH)()


def version_of(parameter: nn.Parameter) -> int:
    """How often a parameter was written in place (`Tensor._version`); -1 for inference tensors, which do not count."""
    if parameter.is_inference():
        return -1
    return needed(parameter, "_version", "notice that weights have changed", *_TORCH)


def transform_is_on() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is on.

    Asks `torch._C._functorch.peek_interpreter_stack` and `forward_ad._current_level`. Where they are gone, no transform
    can be seen, and tensors of transforms are refused by their type or fail in the comparison of bits.
    """
    peek = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", None)
    return (peek is not None and peek() is not None) or getattr(forward_ad, "_current_level", -1) >= 0


def cpu_has(feature: str) -> bool:
    """Whether PyTorch says that this CPU has a feature: `torch.cpu._is_{feature}_supported`, e.g. "avx512_bf16".

    False where PyTorch has no such question: then a kernel that needs the feature is not chosen, and results stay.
    """
    return bool(getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)())


def block_mask_type() -> type:
    """FlexAttention's `BlockMask`, to derive a mask from whose own `__init__` is never called.

    Transformers hands such a mask through unchanged; its class must allow that nothing of BlockMask's is set.
    """
    from torch.nn.attention import flex_attention

    return needed(flex_attention, "BlockMask", "carry a mask through Transformers", *_TORCH)


def is_being_imported(module: ModuleType | None) -> bool:
    """Whether a module in `sys.modules` is still running its own code (`__spec__._initializing` of importlib).

    Where importlib has no such mark, a module counts as imported, as `importlib` itself then assumes.
    """
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))
