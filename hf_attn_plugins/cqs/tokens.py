"""Access to ranges of tokens, wherever the tensor lies: in memory, mapped from a file, or gathered by a worker."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_attn_plugins.cqs.worker_share import Range, joined

TOKENS = 2  # the dimension of tokens in (B, H, N, D)


class Tokens:
    """Ranges of positions of a (B, H, N, D) tensor.

    Args:
        tensor: holds the tokens of `ranges` one after another.
        ranges: ascending positions; all of 0 .. N when None.
        cuts: positions at which ranges begin and end. Given these, the tensor is split once, so that the backward pass
            joins the pieces' gradients once instead of writing zeros around each of them.
    """

    def __init__(
        self, tensor: Tensor, ranges: Sequence[Range] | None = None, cuts: Sequence[int] | None = None
    ) -> None:
        self.tensor = tensor
        self.ranges = joined(list(ranges)) if ranges is not None else ((0, tensor.shape[TOKENS]),)
        self._cuts = cuts
        self._parts = tensor.split([b - a for a, b in itertools.pairwise(cuts)], TOKENS) if cuts else None

    def take(self, ranges: Sequence[Range]) -> Tensor:
        """The tokens of ascending ranges, one after another: a view where they are neighbours, else a copy."""
        if self._parts is not None and self._cuts is not None:
            parts: list[Tensor] = []
            for begin, end in ranges:
                parts += self._parts[bisect.bisect(self._cuts, begin) - 1 : bisect.bisect_left(self._cuts, end)]
        else:
            places = joined([self._place(wanted) for wanted in ranges])
            parts = [self.tensor.narrow(TOKENS, begin, end - begin) for begin, end in places]
        return parts[0] if len(parts) == 1 else torch.cat(parts, TOKENS)

    def gather(self, ranges: Sequence[Range]) -> Tokens:
        """The same tokens, held by themselves; left where they are under autograd, which would copy them twice."""
        return self if self._parts is not None else Tokens(self.take(ranges), ranges)

    def _place(self, wanted: Range) -> Range:
        passed = 0
        for begin, end in self.ranges:
            if begin <= wanted[0] and wanted[1] <= end:
                return passed + wanted[0] - begin, passed + wanted[1] - begin
            passed += end - begin
        raise ValueError(f"tokens {wanted[0]} .. {wanted[1]} are not among those held, {self.ranges}.")


class Parts(Tokens):
    """Ranges of positions that are tensors of their own, as when each came from somewhere else.

    Args:
        parts: (B, H, end - begin, D) by range; ranges are disjoint.
    """

    def __init__(self, parts: Mapping[Range, Tensor]) -> None:
        self._held = sorted(parts.items(), key=lambda part: part[0])
        self.ranges = joined([span for span, _ in self._held])

    def take(self, ranges: Sequence[Range]) -> Tensor:
        """As `Tokens.take`; a range is one that is held, or several neighbouring ones."""
        found: list[Tensor] = []
        for begin, end in ranges:
            inside = [(span, tensor) for span, tensor in self._held if begin <= span[0] and span[1] <= end]
            if sum(span[1] - span[0] for span, _ in inside) != end - begin:
                raise ValueError(f"tokens {begin} .. {end} are not among those held, {self.ranges}.")
            found += [tensor for _, tensor in inside]
        return found[0] if len(found) == 1 else torch.cat(found, TOKENS)

    def gather(self, ranges: Sequence[Range]) -> Tokens:
        """The same tokens one after another; left where they are under autograd, which would copy them twice."""
        return self if torch.is_grad_enabled() else Tokens(self.take(ranges), ranges)
