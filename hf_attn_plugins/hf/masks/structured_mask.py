"""Masks as they travel through a model: a small structure that becomes a T x S tensor only where a model asks for one.

`StructuredMask` is a tensor of shape (B, 1, Q, K) to everyone who looks: it passes wherever Transformers asks whether a
mask is a tensor. Code that computes with the mask gets what the family's own backend would have got: booleans for
`sdpa`, floats to add for families that have `eager` only. Our attention function reads the structure instead. While
torch.compile or torch.export trace, `TracedMask` travels, since a tensor subclass would end up in the graph.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core import compat
from hf_attn_plugins.core.clean_thread import in_clean_thread
from hf_attn_plugins.core.mask import Mask


@dataclass(frozen=True, eq=False)
class Structure:
    """What is known about a mask.

    Attributes:
        mask: which pairs are visible.
        shape: (B, 1, Q, K).
        is_causal: whether it belongs to causal self-attention, whatever else restricts or extends it.
        recognised: what the mask was recognised as, such as ("causal", "window 512"); empty where it was not.
        skippable: whether `sdpa` would have got no mask at all, and relied on `is_causal` and on the shapes.
    """

    mask: Mask
    shape: tuple[int, int, int, int]
    is_causal: bool = False
    recognised: tuple[str, ...] = field(default=())
    skippable: bool = False

    def replace(self, **changes: Any) -> Structure:
        """A copy with the named fields changed."""
        return Structure(**{**self.__dict__, **changes})

    def last_rows(self, start: int, stop: int) -> Structure:
        """The structure of queries start .. stop."""
        batch, heads, queries, keys = self.shape
        mask = self.mask
        segments = None if mask.query_segments is None else mask.query_segments[:, start:stop]
        first = keys - queries if mask.offset is None else mask.offset
        rows = max(0, stop - start)
        return self.replace(
            mask=mask.replace(offset=first + start, query_segments=segments),
            shape=(batch, heads, rows, keys),
            skippable=self.skippable and rows == queries,
        )

    def to(self, device: Any) -> Structure:
        """The structure with its tensors on another device."""

        def move(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        names = ("offset", "key_padding", "query_segments", "key_segments")
        return self.replace(mask=self.mask.replace(**{name: move(getattr(self.mask, name)) for name in names}))

    def tensor(self, device: torch.device, dtype: torch.dtype = torch.bool) -> Tensor:
        """The mask written out, (B, 1, Q, K): True where a query may attend; as floats 0, else the lowest."""
        batch, _, queries, keys = self.shape
        start = keys - queries if self.mask.offset is None else self.mask.offset
        rows, columns = (torch.arange(n, device=device) for n in (queries, keys))
        seen = self.mask.visible(rows, columns, start, batch).expand(batch, 1, queries, keys)
        if dtype == torch.bool:
            return seen
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, torch.finfo(dtype).min)


class StructuredMask(Tensor):
    """A `Structure` as a tensor that is written out only when something computes with it."""

    structure: Structure

    @staticmethod
    def __new__(
        cls, structure: Structure, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bool
    ) -> StructuredMask:
        made = compat.without_data(cls, structure.shape, dtype, torch.device(device))
        made.structure = structure
        return made

    __torch_function__ = compat.no_torch_function()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kept = _kept(func, args, kwargs or {})
        if kept is not None:
            return kept

        def plain(x: Any) -> Any:
            if isinstance(x, StructuredMask):
                if x.structure.mask.predicate is None:
                    return x.structure.tensor(x.device, x.dtype)
                # A model's own mask function may need vmap, which does not work in here.
                return in_clean_thread(x.device, lambda: x.structure.tensor(x.device, x.dtype))
            return [plain(y) for y in x] if isinstance(x, list | tuple) else x

        return func(*plain(args), **{name: plain(x) for name, x in (kwargs or {}).items()})

    def __deepcopy__(self, memo: dict[int, Any]) -> StructuredMask:
        return StructuredMask(copy.deepcopy(self.structure, memo), self.device, self.dtype)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"StructuredMask(shape={tuple(self.shape)}, {self.structure.mask})"


aten = torch.ops.aten
_SAME = {aten.detach.default, aten.alias.default, aten.clone.default, aten.contiguous.default, aten.lift_fresh.default}
_COPY = compat.copy_operator()


def _kept(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> StructuredMask | None:
    """The result of an operator that leaves a mask a mask: copies, moves, and cuts of queries; None for all others."""
    mask = args[0] if args else None
    if not isinstance(mask, StructuredMask):
        return None
    if func in _SAME:
        return StructuredMask(mask.structure, mask.device, mask.dtype)
    if func is _COPY and kwargs.get("dtype") in (None, mask.dtype):
        device = kwargs.get("device") or mask.device
        return StructuredMask(mask.structure.to(device), device, mask.dtype)
    if func is aten.slice.Tensor and not kwargs:
        given = [*args[1:], *[0, None, None, 1][len(args) - 1 :]]
        dim, start, stop, step = given[0], given[1], given[2], given[3]
        first, last, _ = slice(start, stop).indices(mask.shape[dim])
        if step == 1 and (first, last) == (0, mask.shape[dim]):
            return StructuredMask(mask.structure, mask.device, mask.dtype)
        if step == 1 and dim in (2, -2) and last > first:
            return StructuredMask(mask.structure.last_rows(first, last), mask.device, mask.dtype)
    return None


class TracedMask(compat.block_mask_type()):  # type: ignore[misc]
    """A `Structure` while a graph is traced; to `isinstance` a BlockMask, which is how Transformers lets it pass.

    Code that computes with it gets the tensor that `StructuredMask` would have become.
    """

    def __init__(self, structure: Structure, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bool):
        self.structure, self.device, self.dtype = structure, device, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.structure.shape

    @property
    def ndim(self) -> int:
        return 4

    def __repr__(self) -> str:
        return f"TracedMask(shape={self.structure.shape}, {self.structure.mask})"

    __str__ = __repr__

    def tensor(self) -> Tensor:
        """The mask written out, (B, 1, Q, K), in `dtype`."""
        return self.structure.tensor(torch.device(self.device), self.dtype)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """The mask on another device; as a tensor in another dtype."""
        given = [*args, *kwargs.values()]
        if any(isinstance(each, torch.dtype) and each != self.dtype for each in given):
            return self.tensor().to(*args, **kwargs)
        device = next((each for each in given if isinstance(each, str | torch.device)), self.device)
        return TracedMask(self.structure.to(device), device, self.dtype)

    def contiguous(self) -> TracedMask:
        """Itself: `generate` makes prepared masks contiguous."""
        return self

    def __getitem__(self, index: Any) -> Any:
        """`mask[:, :, -n:]` keeps the last n queries as a mask; whatever else is cut out is a tensor."""
        cut = index if isinstance(index, tuple) else (index,)
        everything = slice(None)
        if len(cut) in (3, 4) and isinstance(cut[2], slice):
            start, stop, step = cut[2].indices(self.structure.shape[2])
            if step == 1 and all(part == everything for i, part in enumerate(cut) if i != 2):
                return TracedMask(self.structure.last_rows(start, stop), self.device, self.dtype)
        return self.tensor()[index]

    def __getattr__(self, name: str) -> Any:
        """Whatever else a tensor has: `mask.repeat(...)`."""
        return getattr(self.tensor(), name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """`torch.where(mask, ...)` and other functions of PyTorch."""

        def plain(x: Any) -> Any:
            if isinstance(x, list | tuple):
                return [plain(y) for y in x]
            return x.tensor() if isinstance(x, TracedMask) else x

        return func(*map(plain, args), **{name: plain(x) for name, x in (kwargs or {}).items()})


def _operator(name: str) -> Any:
    def of_tensor(self: TracedMask, *others: Any) -> Any:
        return getattr(self.tensor(), name)(*others)

    return of_tensor


# Python looks these up in the class, past __getattr__; beside plain numbers, __torch_function__ is not asked either.
for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "and", "or", "eq", "ne", "lt", "le", "gt", "ge", "invert"):
    setattr(TracedMask, f"__{_name}__", _operator(f"__{_name}__"))


_FORMS = (StructuredMask, TracedMask)


def structure_of(attention_mask: Any) -> Structure | None:
    """The structure of a mask that our mask function made; None for any other."""
    return attention_mask.structure if isinstance(attention_mask, _FORMS) else None


def travelling(
    structure: Structure, device: torch.device | str = "cpu", dtype: torch.dtype = torch.bool
) -> StructuredMask | TracedMask:
    """A structure in the form in which it travels now."""
    kind = TracedMask if torch.compiler.is_compiling() else StructuredMask
    return kind(structure, device, dtype)
