"""Ranges of tokens of a tensor that holds all positions, or only some of them."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hf_attn_plugins.cqs.planning.worker_share import Range, joined

TOKENS = 2  # the dimension of tokens in (B, H, N, D)


class Tokens:
    """Ranges of positions of a (B, H, N, D) tensor.

    Args:
        tensor: (B, H, n, D), the tokens of `ranges` one after another.
        ranges: ascending ranges of positions; None means 0 .. n.
        cuts: positions at which all ranges asked for begin and end. Given under autograd: the tensor is split once, so
            that the backward pass joins all gradients once instead of padding each with zeros to the full length.
    """

    def __init__(
        self, tensor: Tensor, ranges: Sequence[Range] | None = None, cuts: Sequence[int] | None = None
    ) -> None:
        self.tensor = tensor
        self.ranges = joined(list(ranges)) if ranges is not None else ((0, tensor.shape[TOKENS]),)
        self._cuts = cuts
        self._parts = tensor.split([b - a for a, b in itertools.pairwise(cuts)], TOKENS) if cuts else None

    def take(self, ranges: Sequence[Range]) -> Tensor:
        """(B, H, n, D): the tokens of ascending ranges, one after another; a view if they are neighbours, else a copy.

        Raises:
            ValueError: a token is not held.
        """
        if self._parts is not None and self._cuts is not None:
            parts: list[Tensor] = []
            for begin, end in ranges:
                parts += self._parts[bisect.bisect(self._cuts, begin) - 1 : bisect.bisect_left(self._cuts, end)]
        else:
            places = joined([self._place(wanted) for wanted in ranges])
            parts = [self.tensor.narrow(TOKENS, begin, end - begin) for begin, end in places]
        return parts[0] if len(parts) == 1 else torch.cat(parts, TOKENS)

    def gather(self, ranges: Sequence[Range]) -> Tokens:
        """These tokens in a tensor of their own. With `cuts` self: `take` copies, and autograd keeps each copy."""
        return self if self._parts is not None else Tokens(self.take(ranges), ranges)

    def _place(self, wanted: Range) -> Range:
        passed = 0
        for begin, end in self.ranges:
            if begin <= wanted[0] and wanted[1] <= end:
                return passed + wanted[0] - begin, passed + wanted[1] - begin
            passed += end - begin
        raise ValueError(f"tokens {wanted[0]} .. {wanted[1]} are not among those held, {self.ranges}.")


class Parts(Tokens):
    """Ranges of positions that are one tensor each, for example received from other ranks.

    Args:
        parts: (B, H, end - begin, D) by range; ranges are disjoint.
    """

    def __init__(self, parts: Mapping[Range, Tensor]) -> None:
        self._held = sorted(parts.items(), key=lambda part: part[0])
        self.ranges = joined([span for span, _ in self._held])

    def take(self, ranges: Sequence[Range]) -> Tensor:
        """As `Tokens.take`; a range is one of `parts`, or several neighbouring ones."""
        found: list[Tensor] = []
        for begin, end in ranges:
            inside = [(span, tensor) for span, tensor in self._held if begin <= span[0] and span[1] <= end]
            if sum(span[1] - span[0] for span, _ in inside) != end - begin:
                raise ValueError(f"tokens {begin} .. {end} are not among those held, {self.ranges}.")
            found += [tensor for _, tensor in inside]
        return found[0] if len(found) == 1 else torch.cat(found, TOKENS)

    def gather(self, ranges: Sequence[Range]) -> Tokens:
        """These tokens in one tensor. Under autograd self: `take` copies, and autograd keeps each copy."""
        return self if torch.is_grad_enabled() else Tokens(self.take(ranges), ranges)
