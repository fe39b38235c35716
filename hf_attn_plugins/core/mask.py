"""What may be attended, as a small structure instead of a T x S tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_attn_plugins.core.drops import Drops

Window = tuple[int | None, int | None]
Predicate = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class Mask:
    """Which of S keys each of T query rows may attend to.

    Row t stands at position `t + offset` on the key axis. Key s is visible to it when all of these hold:

    * `causal`: s <= t + offset; `window` (left, right): t + offset - left <= s <= t + offset + right; both are
      overruled for s < `prefix` (a prefix that every row sees);
    * `key_padding`[b, s] is True; `query_segments`[b, t] == `key_segments`[b, s];
    * `predicate`(b, h, t + offset, s) is True; `bias` is True (bool) or added to the scaled score (float).

    Attributes:
        causal: whether a row sees only keys at or before its own position.
        window: (left, right) counts of keys on either side of a row's own position, None for no bound.
        offset: position of row 0 on the key axis, an int or a 0-dim integer tensor (static caches); None means S - T,
            which aligns the last row with the last key.
        prefix: number of leading keys that every row sees whatever its position.
        key_padding: (B, S) bool, True for real keys; padding may be on either side, or anywhere.
        query_segments, key_segments: (B, T) and (B, S) integers; a row sees only keys of its own segment.
        predicate: index function as in Transformers' masking utilities, evaluated on tiles only.
        beside: index function of pairs that a sparse method's plan must not hide, such as an image's tokens among
            themselves; the other fields show these pairs already, so exact methods do not read it.
        bias: bool or float, broadcastable to (B, H, T, S); the last resort.
        drops: under dropout, the places that decide which weights are dropped (see `core.drops`); hides no pair. None
            draws a new seed in every call.
    """

    causal: bool = False
    window: Window = (None, None)
    offset: int | Tensor | None = None
    prefix: int = 0
    key_padding: Tensor | None = None
    query_segments: Tensor | None = None
    key_segments: Tensor | None = None
    predicate: Predicate | None = None
    beside: Predicate | None = None
    bias: Tensor | None = None
    drops: Drops | None = None

    def replace(self, **changes: object) -> Mask:
        """A copy with the named fields changed (without `dataclasses.replace`'s cost: this runs in every call)."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__)
        for name, value in changes.items():
            if name not in copy.__dict__:
                raise TypeError(f"Mask has no field {name!r}.")
            copy.__dict__[name] = value
        return copy

    def dropping(self, dropout: float, query: Tensor, key: Tensor) -> Mask:
        """The mask with `drops`: newly drawn for all rows and keys of a call if it has none; itself without dropout."""
        if not dropout or self.drops is not None:
            return self
        return self.replace(drops=Drops.draw(query, query.shape[2], key.shape[2]))

    def start(self, num_rows: int, num_keys: int) -> int:
        """Position of row 0 on the key axis as an int (reads a tensor offset, which waits for its device)."""
        if self.offset is None:
            return num_keys - num_rows
        return int(self.offset)

    def has_no_tensors(self) -> bool:
        """True when nothing but `causal`, `window`, `offset` and `prefix` decides."""
        return self.key_padding is None and self.query_segments is None and self.predicate is None and self.bias is None

    def is_plain(self, start: int) -> bool:
        """True when the mask is causal or full and no more, its row 0 standing at position `start`."""
        in_place = self.offset is None or (isinstance(self.offset, int) and self.offset == start)
        bare = self.has_no_tensors() and self.drops is None
        return in_place and self.window == (None, None) and not self.prefix and bare

    def trimmed(self, num_rows: int, num_keys: int) -> tuple[Mask, slice]:
        """Drop the bounds that do not bind and the keys no row can reach by its position.

        Returns:
            The simpler mask and the slice of keys it is about; masks with a tensor offset or a prefix stay as they are.
        """
        if num_rows == 1 and (self is CAUSAL or self.is_plain(num_keys - 1)):  # decoding: the last row sees every key
            return FULL, slice(0, num_keys)
        if isinstance(self.offset, Tensor) or self.prefix or not (self.causal or self.window != (None, None)):
            return self, slice(0, num_keys)
        ends_together = self.offset is None or self.offset == num_keys - num_rows  # the last row and the last key
        if ends_together and self.window == (None, None) and 1 < num_rows <= num_keys:
            return self, slice(0, num_keys)
        start, (left, right) = self.start(num_rows, num_keys), self.window
        last = start + num_rows - 1
        first_key = 0 if left is None else min(max(0, start - left), num_keys)
        end = num_keys
        if self.causal:
            end = max(first_key, min(end, last + 1))
        if right is not None:
            end = max(first_key, min(end, last + right + 1))
        if left is not None and last - left <= first_key:
            left = None
        if right is not None and start + right >= end - 1:
            right = None
        causal = self.causal and start < end - 1
        keys = slice(first_key, end)
        mask = self.over_keys(keys)
        offset = start - first_key if causal or (left, right) != (None, None) or self.predicate is not None else None
        return mask.replace(causal=causal, window=(left, right), offset=offset), keys

    def over_keys(self, keys: slice) -> Mask:
        """Tensors and predicate cut to some keys; `offset` and `prefix` still count from the first of all."""
        bias, shift = self.bias, keys.start or 0

        def cut(whole: Predicate | None) -> Predicate | None:
            if whole is None or not shift:
                return whole
            return lambda b, h, q, k: whole(b, h, q + shift, k + shift)

        if bias is not None and bias.ndim and bias.shape[-1] > 1:
            bias = bias[..., keys]
        padding, segments = self.key_padding, self.key_segments
        return self.replace(
            key_padding=None if padding is None else padding[:, keys],
            key_segments=None if segments is None else segments[:, keys],
            predicate=cut(self.predicate),
            beside=cut(self.beside),
            bias=bias,
            drops=None if self.drops is None else self.drops.cut(keys=keys),
        )

    def slice_batch(self, index: int) -> Mask:
        """The mask of one row of the batch, every tensor keeping a batch dimension of size 1."""

        def row(tensor: Tensor | None) -> Tensor | None:
            return tensor if tensor is None or tensor.shape[0] == 1 else tensor[index : index + 1]

        def cut(whole: Predicate | None) -> Predicate | None:
            return None if whole is None else lambda b, h, q, k: whole(b + index, h, q, k)

        return self.replace(
            key_padding=row(self.key_padding),
            query_segments=row(self.query_segments),
            key_segments=row(self.key_segments),
            predicate=cut(self.predicate),
            beside=cut(self.beside),
            bias=None if self.bias is None else row(self.bias.reshape((1,) * (4 - self.bias.ndim) + self.bias.shape)),
            drops=None if self.drops is None else self.drops.of_batch_row(index),
        )

    def visible(self, rows: Tensor, keys: Tensor, start: int | Tensor, batch: int = 1) -> Tensor:
        """Visibility of a tile, float biases left aside.

        Args:
            rows, keys: 1-d integer tensors, indices of rows and of keys.
            start: position of row 0 on the key axis.
            batch: rows of the batch that `predicate` is asked for.

        Returns:
            bool, broadcastable to (B, H, len(rows), len(keys)).
        """
        position, key = (rows + start).unsqueeze(-1), keys.unsqueeze(0)
        seen = torch.ones(len(rows), len(keys), dtype=torch.bool, device=rows.device)
        left, right = self.window
        if self.causal:
            seen = seen & (key <= position)
        if left is not None:
            seen = seen & (key >= position - left)
        if right is not None:
            seen = seen & (key <= position + right)
        if self.prefix:
            seen = seen | (key < self.prefix)
        seen = seen[None, None]
        if self.key_padding is not None:
            seen = seen & self.key_padding[:, None, None, keys]
        if self.query_segments is not None and self.key_segments is not None:
            same = self.query_segments[:, rows].unsqueeze(-1) == self.key_segments[:, keys].unsqueeze(-2)
            seen = seen & same.unsqueeze(1)
        if self.predicate is not None:
            b = torch.arange(batch, device=keys.device).view(-1, 1, 1, 1)
            seen = seen & self.predicate(b, torch.zeros_like(b[:1]), position[None, None], key[None, None])
        if self.bias is not None and self.bias.dtype == torch.bool:
            seen = seen & self.bias_tile(rows, keys)
        return seen

    def bias_tile(self, rows: Tensor, keys: Tensor) -> Tensor:
        """The part of `bias` for these rows and keys, dimensions of size 1 kept."""
        assert self.bias is not None
        bias = self.bias.reshape((1,) * (4 - self.bias.ndim) + self.bias.shape)
        if bias.shape[2] > 1:
            bias = bias[:, :, rows]
        return bias[..., keys] if bias.shape[3] > 1 else bias


def window_of(window: int | Window | None) -> Window:
    """Normalise a window: an int w means "the last w keys, oneself included", as in Transformers' sliding_window.

    Raises:
        ValueError: a window smaller than one key, or of another form.
    """
    if window is None:
        return (None, None)
    if isinstance(window, int):
        if window < 1:
            raise ValueError(f"window={window}: a sliding window holds at least 1 key; pass None for no window.")
        return (window - 1, None)
    if len(window) != 2 or any(side is not None and side < 0 for side in window):
        raise ValueError(f"window={window}: pass an int, or (left, right) with counts >= 0 or None on either side.")
    return (window[0], window[1])


FULL, CAUSAL = Mask(), Mask(causal=True)


def one_mask(mask: Mask | Tensor | None, is_causal: bool, window: int | Window | None) -> Mask:
    """Everything that hides keys, as one `Mask`; a tensor becomes its `bias`.

    Raises:
        ValueError: a mask tensor that is neither bool nor float, or a window beside a mask that has one.
    """
    if mask is None and window is None:
        return CAUSAL if is_causal else FULL
    if isinstance(mask, Tensor):
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(f"a mask tensor is bool (True = attend) or float (added to scores), got {mask.dtype}.")
        mask = Mask(bias=mask)
    mask = mask or FULL
    if is_causal and not mask.causal:
        mask = mask.replace(causal=True)
    if window is not None:
        if mask.window != (None, None):
            raise ValueError(f"window={window} was given beside a mask with window {mask.window}: pass one of them.")
        mask = mask.replace(window=window_of(window))
    return mask


def padding_from_lengths(lengths: Tensor, num_keys: int, side: str = "right") -> Tensor:
    """(B, S) key padding from (B,) counts of real keys, padded on the `side` "left" or "right"."""
    if side not in ("left", "right"):
        raise ValueError(f"side={side!r}: padding is on the 'left' or on the 'right'.")
    index = torch.arange(num_keys, device=lengths.device)
    if side == "left":
        return index >= num_keys - lengths.unsqueeze(-1)
    return index < lengths.unsqueeze(-1)
