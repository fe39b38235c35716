"""Which attention weights dropout drops: a function of a seed and of a weight's place, whatever computes the weight.

A weight is dropped where the hash of (seed, batch row and head, row, key) is small. So kernels, tiles, the pieces of a
plan, several ranks and the backward pass all drop the same weights of one attention call.

The hash is `mixed(row_hash ^ key_hash)`. `Drops.hashes` computes the two hashes; the kernels mix each pair of them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MIX_1, MIX_2 = 0x7FEB352D, 0x846CA68B  # of Wellons' "lowbias32", which has little bias for 32 bits; as in altered.h
BITS = 24  # a share in units of 2**-24 is exact in float32, in which some kernels compare

ROOM = 1024  # more than the rows or keys of any kernel's tile


class Drops(NamedTuple):
    """The seed of an attention call, and the places of the weights that one kernel call computes.

    Attributes:
        seed: 0-dim int64, from 0 to 2**62.
        lanes: (B, H) int64, batch row times the number of query heads, plus head: counted in the whole call.
        rows: (1 or B, T) int64, the positions of the query rows in the whole call.
        keys: (1 or B, S) int64, the positions of the keys in the whole call.
    """

    seed: Tensor
    lanes: Tensor
    rows: Tensor
    keys: Tensor

    @classmethod
    def draw(cls, query: Tensor, rows: int, keys: int, part: int = 0, parts: int = 1) -> Drops:
        """A new seed from the default generator of the query's device, and the places of all weights of a call.

        Args:
            query: (B, H, ..., D).
            rows, keys: T and S.
            part, parts: H heads are this part, from 0, of as many equal parts of a layer's heads.
        """
        (batch, heads), device = query.shape[:2], query.device
        seed = torch.randint(2**62, (), device=device)
        lanes = torch.arange(batch * parts * heads, device=device).view(batch, parts, heads)[:, part]
        return cls(seed, lanes, *(torch.arange(count, device=device)[None] for count in (rows, keys)))

    def cut(self, rows: slice = slice(None), keys: slice = slice(None), heads: slice = slice(None)) -> Drops:
        """The places of some rows, keys and query heads."""
        return Drops(self.seed, self.lanes[:, heads], self.rows[:, rows], self.keys[:, keys])

    def at(self, rows: slice, runs: Sequence[tuple[int, int]]) -> Drops:
        """The places of some rows, and of the keys of some ranges one after another."""
        keys = torch.cat([self.keys[:, begin:end] for begin, end in runs], 1)
        return Drops(self.seed, self.lanes, self.rows[:, rows], keys)

    def of_batch_row(self, index: int) -> Drops:
        """The places of one batch row."""
        rows, keys = (x if len(x) == 1 else x[index : index + 1] for x in (self.rows, self.keys))
        return Drops(self.seed, self.lanes[index : index + 1], rows, keys)

    def folded(self, parts: int) -> Drops:
        """The places after (B, H, ...) became (B * parts, H / parts, ...)."""
        rows, keys = (x if len(x) == 1 else x.repeat_interleave(parts, 0) for x in (self.rows, self.keys))
        return Drops(self.seed, self.lanes.reshape(len(self.lanes) * parts, -1), rows, keys)

    @property
    def is_shared(self) -> bool:
        """Whether all batch rows have the same positions."""
        return len(self.rows) == len(self.keys) == 1

    def joined(self) -> Drops:
        """The places after (B, H, ...) became (1, B * H, ...), of batch rows with the same positions."""
        return self._replace(lanes=self.lanes.reshape(1, -1))

    def hashes(self) -> tuple[Tensor, Tensor]:
        """(B, H, T) int32 of the rows, and (1 or B, S) int32 of the keys, both contiguous."""
        low, high = as_32_bits(self.seed), as_32_bits(self.seed >> 32)
        lanes = mixed(as_32_bits(self.lanes) + mixed(high))[..., None]
        rows = mixed(mixed(as_32_bits(self.rows) ^ low)[:, None] ^ lanes)
        return rows.contiguous(), mixed(as_32_bits(self.keys) + mixed(as_32_bits(self.seed >> 16))).contiguous()

    def tables(self) -> tuple[Tensor, Tensor]:
        """The hashes of (B, H, T) and (B, S), flat, with `ROOM` behind them: kernels read on to the end of a tile."""
        rows, keys = self.hashes()
        keys = keys.expand(len(rows), -1)
        return torch.cat([rows.flatten(), rows.new_zeros(ROOM)]), torch.cat([keys.flatten(), keys.new_zeros(ROOM)])

    def kept(self, dropout: float, dtype: torch.dtype) -> Tensor:
        """(B, H, T, S): 0 for dropped weights, 1 / (1 - dropout) for kept ones."""
        rows, keys = self.hashes()
        return kept(rows[..., None], keys[:, None, None], dropout, dtype)


def share_below(dropout: float) -> int:
    """A weight is dropped where the upper 24 bits of its hash are below this number."""
    (rounded,) = struct.unpack("f", struct.pack("f", dropout))
    return min(math.ceil(rounded * 2**BITS), 2**BITS - 1)


def kept(row_hashes: Tensor, key_hashes: Tensor, dropout: float, dtype: torch.dtype) -> Tensor:
    """0 for dropped weights, 1 / (1 - dropout) for kept ones, of hashes that broadcast to the shape of the weights."""
    # Compared without a sign: the highest bit is turned over on both sides.
    turned = mixed(row_hashes ^ key_hashes).bitwise_xor_(-(2**31))
    return (turned >= (share_below(dropout) << (32 - BITS)) - 2**31).to(dtype).div_(1 - dropout)


def mixed(x: Tensor) -> Tensor:
    """The hash of 32-bit integers, as int32 whose products wrap around; `mixed` of altered.h."""
    x = ((x >> 16).bitwise_and_(0xFFFF).bitwise_xor_(x)).mul_(MIX_1)
    x = ((x >> 15).bitwise_and_(0x1FFFF).bitwise_xor_(x)).mul_(MIX_2 - 2**32)
    return (x >> 16).bitwise_and_(0xFFFF).bitwise_xor_(x)


def as_32_bits(x: Tensor) -> Tensor:
    """The lower 32 bits of integers, as int32."""
    low = x & 0xFFFFFFFF
    return torch.where(low < 2**31, low, low - 2**32).to(torch.int32)
