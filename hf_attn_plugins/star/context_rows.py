"""Rows of a context that come behind a filled cache: what the explicit form asks for where heads differ.

A later turn is a query and sees everything, so a call alone cannot tell it from the next piece of a context. The
explicit form says which one it is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.kernels.attend_rectangles import attend_rectangles
from hf_attn_plugins.kernels.bound_attend import BoundAttend
from hf_attn_plugins.star.plan import Plan
from hf_attn_plugins.star.rectangles import rectangles_of

_in_context: ContextVar[bool] = ContextVar("rows behind the cache belong to the context", default=False)


@contextlib.contextmanager
def in_context() -> Iterator[None]:
    """Inside `with`, rows behind a filled cache go on with the context's blocks instead of being a query."""
    before = _in_context.set(True)
    try:
        yield
    finally:
        _in_context.reset(before)


def is_context(start: int | None) -> bool:
    """Whether rows from position `start` on are such rows."""
    return bool(start) and _in_context.get()


def later_rectangles(plan: Plan, start: int) -> list[Rectangle]:
    """The rectangles of `rectangles_of(plan)` as far as they lie in rows from `start` on, which is row 0 here."""
    clipped = (each._replace(row_begin=max(0, each.row_begin - start), row_end=each.row_end - start)
               for each in rectangles_of(plan))  # fmt: skip
    return [each for each in clipped if not each.is_empty]


def context_rows(query: Tensor, key: Tensor, value: Tensor, mask: Mask, plan: Plan, kernel: BoundAttend) -> Partial:
    """The last rows of a plan over all keys of it.

    Args:
        query: (B, Hq, T, D); key, value: (B, Hkv, L, D) and (B, Hkv, L, Dv), L being the plan's length.
        mask: causal, perhaps with a window; no padding, segments or predicate.
        plan: without a query; rows T of it are computed.

    Raises:
        ValueError: the mask holds more.
    """
    if not mask.has_no_tensors() or mask.prefix:
        raise ValueError("a context is encoded unpadded and causal: no padding, segments, bias or prefix in its mask.")
    start = plan.length - query.shape[2]
    mask = mask.replace(offset=start)
    if plan.is_dense:
        return kernel(query, key, value, mask=mask)
    return attend_rectangles(query, key, value, later_rectangles(plan, start), mask=mask, **kernel.options)
