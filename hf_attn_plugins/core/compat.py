"""Every private name of PyTorch that this package leans on, behind one function each.

An upgrade that takes a name away fails here, with one sentence; tests/core/test_compat.py looks at each name.
`hf/compat.py` does the same for Transformers, `core/imports.py` for Python's importlib.
"""

from __future__ import annotations

import functools
import inspect
from collections import OrderedDict
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import multi_head_attention_forward
from torch.utils import _python_dispatch
from torch.utils._device import DeviceContext

_TORCH = ("torch", "2.13")  # and the version that everything here was tested with
_CARRY = "carry a mask through Transformers"


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


# Operators and the CPU.


def fused_operator(name: str) -> Callable[..., Any]:
    """One of `torch.ops.aten._scaled_dot_product_*`: fused attention that also returns the lse, or its backward.

    The binding in `torch` is taken where there is one: it is the same operator, some microseconds closer.
    """
    return torch.__dict__.get(name) or needed(torch.ops.aten, name, "use PyTorch's fused attention", *_TORCH)


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


def cpu_has(feature: str) -> bool:
    """Whether PyTorch says that this CPU has a feature: `torch.cpu._is_{feature}_supported`, e.g. "avx512_bf16".

    False where PyTorch has no such question: then a kernel that needs the feature is not chosen, and results stay.
    Linux must let a process use AMX's registers, and is asked to.
    """
    if feature == "amx_tile" and not getattr(torch.cpu, "_init_amx", lambda: False)():
        return False
    return bool(getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)())


# Modules.


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


def inside_compiled(model: nn.Module) -> nn.Module:
    """The module that `torch.compile` has wrapped (`OptimizedModule._orig_mod`)."""
    return needed(model, "_orig_mod", "look inside a compiled model", *_TORCH)


def hooks_of(module: Any) -> list[Any]:
    """A module's own hooks (its dicts `_forward_hooks`, `_forward_pre_hooks`, and the same of backward)."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = [needed(module, kind, "see the hooks of a module", *_TORCH) for kind in kinds]
    return [hook for hooks in found for hook in hooks.values()]


def swap_forward_hooks(module: Any, hooks: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """Give a module other forward hooks, none by default; the result, given back, restores those from before."""
    names = ("_forward_hooks", "_forward_pre_hooks")
    before = tuple(needed(module, name, "run a model unseen by its hooks", *_TORCH) for name in names)
    for name, held in zip(names, hooks or (OrderedDict(), OrderedDict()), strict=True):
        setattr(module, name, held)
    return before  # type: ignore[return-value]


_REPLICATE = "_replicate_for_data_parallel"


def replicate_by(module: nn.Module, make: Callable[[], nn.Module] | None) -> None:
    """Let DataParallel copy this module by `make()`; by PyTorch's own method again with None.

    A replica shares the `__dict__` of its original, so also what was set on the instance.
    """
    needed(type(module), _REPLICATE, "keep tables out of DataParallel's replicas", *_TORCH)
    vars(module).pop(_REPLICATE, None)
    if make is not None:
        setattr(module, _REPLICATE, make)


def replica_of(module: nn.Module) -> Any:
    """A copy of a module as DataParallel makes it, without a `make` of `replicate_by`."""
    copied = needed(type(module), _REPLICATE, "keep tables out of DataParallel's replicas", *_TORCH)(module)
    vars(copied).pop(_REPLICATE, None)
    return copied


def is_replica(module: nn.Module) -> bool:
    """Whether DataParallel made this module (`_is_replica`, which only replicas have)."""
    return bool(getattr(module, "_is_replica", False))


# Tensors.


def version_of(tensor: Tensor) -> int:
    """How often a tensor was written in place (`Tensor._version`); -1 for inference tensors, which do not count."""
    if tensor.is_inference():
        return -1
    return needed(tensor, "_version", "notice that a tensor has changed", *_TORCH)


def is_transforming() -> bool:
    """Whether torch.func transforms (`peek_interpreter_stack`) or takes forward-mode gradients (`_current_level`)."""
    try:
        return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0
    except AttributeError:  # every short call asks: `needed` only says what is missing
        purpose = "notice torch.func and forward-mode gradients"
        needed(needed(torch._C, "_functorch", purpose, *_TORCH), "peek_interpreter_stack", purpose, *_TORCH)
        needed(forward_ad, "_current_level", purpose, *_TORCH)
        raise


def modes() -> list[Any]:
    """The modes that see every function and operator now (`_get_current_function_mode_stack` and the dispatcher's).

    `with torch.device(...)`, which only places new tensors, and FLOP counters, which only count, are left out.
    """
    purpose = "notice modes that change what operators compute"
    functions = needed(torch.overrides, "_get_current_function_mode_stack", purpose, *_TORCH)()
    operators = needed(_python_dispatch, "_get_current_dispatch_mode_stack", purpose, *_TORCH)()
    return [mode for mode in (*functions, *operators) if not _harmless(mode)]


def _harmless(mode: Any) -> bool:
    return isinstance(mode, DeviceContext) or type(mode).__module__ == "torch.utils.flop_counter"


def is_fake(tensor: Any) -> bool:
    """Whether a tensor holds no numbers because PyTorch only looks at shapes (`FakeTensor`)."""
    from torch._subclasses import fake_tensor

    return isinstance(tensor, needed(fake_tensor, "FakeTensor", "notice tensors without numbers", *_TORCH))


def without_data(cls: type[Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Any:
    """An instance of a subclass of Tensor that holds no elements (`Tensor._make_wrapper_subclass`)."""
    make = needed(Tensor, "_make_wrapper_subclass", _CARRY, *_TORCH)
    return make(cls, shape, dtype=dtype, device=device)


def no_torch_function() -> Any:
    """What a subclass of Tensor puts in place of `__torch_function__` to be asked in `__torch_dispatch__` only."""
    return needed(torch._C, "_disabled_torch_function_impl", _CARRY, *_TORCH)


def copy_operator() -> Any:
    """The operator behind `tensor.to(...)` and casts (`aten._to_copy`)."""
    return needed(torch.ops.aten, "_to_copy", _CARRY, *_TORCH).default


def block_mask_type() -> type:
    """FlexAttention's `BlockMask`, to derive a mask from whose own `__init__` is never called.

    Transformers hands such a mask through unchanged; its class must allow that nothing of BlockMask's is set.
    """
    from torch.nn.attention import flex_attention

    return needed(flex_attention, "BlockMask", _CARRY, *_TORCH)


# FlexAttention: a public name whose arguments have changed from version to version.


@functools.cache
def flex_attention(compile: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    """FlexAttention as `(query, key, value, score_mod, block_mask, scale, enable_gqa) -> (out, lse)`.

    Args:
        compile: with torch.compile; one function then serves every shape, and recompiles as often as that takes.
    """
    from torch.nn.attention import flex_attention

    module: Any = flex_attention
    if hasattr(module, "AuxRequest"):
        asked = module.AuxRequest(lse=True)

        def run(*inputs: Any) -> tuple[Tensor, Tensor]:
            out, aux = module.flex_attention(*inputs, return_aux=asked)
            return out, aux.lse
    else:

        def run(*inputs: Any) -> tuple[Tensor, Tensor]:
            return module.flex_attention(*inputs, return_lse=True)

    if not compile:
        return run
    known = inspect.signature(torch.compile).parameters
    more: dict[str, Any] = {"recompile_limit": 64, "isolate_recompiles": True}
    # fullgraph: beyond the limit an error, never the uncompiled form, which makes all scores.
    return torch.compile(run, fullgraph=True, **{name: value for name, value in more.items() if name in known})


def block_mask_of(tiles: Any, size: int, seen: Callable[..., Tensor], lengths: tuple[int, int]) -> Any:
    """FlexAttention's `BlockMask` from lists of tiles.

    Args:
        tiles: counts and indices of the tiles to mask, then of those seen whole.
        size: rows and keys of a tile.
        seen: (b, h, row, key) -> bool.
        lengths: rows and keys.
    """
    make = needed(block_mask_type(), "from_kv_blocks", "hand masks to FlexAttention", *_TORCH)
    known = inspect.signature(make).parameters
    return make(*tiles, BLOCK_SIZE=size, mask_mod=seen, **({"seq_lengths": lengths} if "seq_lengths" in known else {}))


# Processes.


def default_store() -> Any:
    """The key-value store that the default process group was made with (`distributed_c10d._get_default_store`)."""
    from torch.distributed import distributed_c10d

    return needed(distributed_c10d, "_get_default_store", "tell the other ranks of a failure", *_TORCH)()
