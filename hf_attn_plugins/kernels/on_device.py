"""What runs on a GPU, and on other devices that are no CPU: the order in which `choose` takes the kernels there.

No GPU has run the Triton kernels of this package. So on CUDA and ROCm PyTorch's own fused operators come first, which
return the lse (flash, efficient; cuDNN where measured). FlexAttention computes what they cannot: softcap, windows,
packed sequences, prefixes, predicates, and plans under these in one launch. Triton computes what is left, once it has
passed its self-test. A measurement on the very kind of GPU changes the order (`measured.py`). Everywhere else tiles of
ordinary operators run (`cpu_tiled`).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.kernels.aten import attend as aten
from hf_attn_plugins.kernels.aten import gpu as aten_gpu
from hf_attn_plugins.kernels.flex import attend as flex
from hf_attn_plugins.kernels.flex.plan import reason_against_plan
from hf_attn_plugins.kernels.measured import fastest, has_rows
from hf_attn_plugins.kernels.triton import support as triton_support

TILES = "cpu_tiled"


def kernel_for(query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float) -> str:
    """The name of the kernel that computes a call; arguments as in `choose.choose`."""
    call = (query, key, value, mask, softcap, dropout)
    for name in ranked(*call):
        if name != "triton" or triton_passes(*call):
            return name
    return TILES


def one_launch(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float,
    plan: Sequence[Sequence[Rectangle]] | None = None,
) -> str | None:  # fmt: skip
    """The kernel that computes a plan in one launch; None where PyTorch's operators compute its pieces, or tiles.

    Args:
        plan: its rectangles; None while only the question is whether to make a plan.
    """
    call = (query, key, value, mask, softcap, dropout)
    for name in ranked(*call, kind="plan"):
        if name == "aten":
            return None
        if name == "flex" and (plan is None or reason_against_plan(plan, query.shape[2]) is None):
            return name
        if name == "triton" and triton_passes(*call, plan=True):
            return name
    return None


def ranked(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float, kind: str = ""
) -> list[str]:
    """The kernels of a CUDA or ROCm device that can compute a call, the one to take first.

    Args:
        kind: of `measured.KINDS`; "" for the call's own.
    """
    if query.device.type != "cuda":
        return []
    call = (query, key, value, mask, softcap, dropout)
    able: tuple[str, ...] = ()  # contenders of `measured`: PyTorch's operators are several, of one kernel
    if aten.reason_against(*call) is None:
        able = aten_gpu.able(query, key, value, aten.on_device_as_bias(query, mask))
        if not has_rows():
            return ["aten"]
    if flex.reason_against(*call) is None:
        able = (*able, "flex")
    if triton_support.reason_against(*call) is None:
        able = (*able, "triton")
    if len(able) > 1:
        kind = kind or aten_gpu.kind_of(query, key, value)
        shape = (query.device, query.dtype, query.shape[-1], kind, aten_gpu.length_of(key))
        first = fastest(*shape, able)
        if first is not None:
            able = (first, *able)
    kernels: list[str] = []
    for name in able:
        kernel = "aten" if name in aten_gpu.OPERATORS else name
        if kernel not in kernels:
            kernels.append(kernel)
    return kernels


def before_named_triton(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float
) -> None:
    """Let the self-test warn where it fails; a kernel that was named runs all the same."""
    triton_passes(query, key, value, mask, softcap, dropout)


def triton_passes(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float, plan: bool = False
) -> bool:
    """Whether Triton's kernels have passed, or now pass, the self-test of what a call uses; a warning says if not."""
    if query.device.type != "cuda" or triton_support.reason_against(query, key, value, mask, softcap, dropout):
        return True  # no GPU: nothing to test; or the kernel itself will say why it cannot
    from hf_attn_plugins.kernels.triton.self_test import passes

    return passes(query, key, value, mask, softcap, dropout, plan)
