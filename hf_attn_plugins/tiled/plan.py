"""FlashAttention's plan as in the papers: block sizes, the order of the tiles, memory traffic. Integers only.

Sizes count elements, as in the papers, not bytes. The kernels of this package choose their tiles by measurement; this
plan is for reading, drawing and running by hand (`hf-attn plan tiled --length 6 --head-dim 3`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

ORDERS = ("keys-outer", "rows-outer")


@dataclass(frozen=True)
class Tile:
    """One step: a block of query rows and a block of keys.

    Attributes:
        row_block, key_block: i and j of the papers.
        rows, keys: their token positions.
        masked: whether causality hides some of the tile's pairs, so that the step applies a mask.
    """

    row_block: int
    key_block: int
    rows: range
    keys: range
    masked: bool

    def describe(self) -> str:
        """In words, such as "rows 2 to 3 meet key 4"."""
        rows, verb = _span("row", self.rows), "meets" if len(self.rows) == 1 else "meet"
        return f"{rows} {verb} {_span('key', self.keys)}" + (", masked above the diagonal" if self.masked else "")


@dataclass(frozen=True)
class MemoryTraffic:
    """Elements read from and written to the large, slow memory (HBM) in one forward pass of one head."""

    read: int
    written: int

    @property
    def total(self) -> int:
        """Elements read and written."""
        return self.read + self.written


@dataclass(frozen=True)
class TilePlan:
    """The tiles of self-attention over `length` tokens, for one head.

    Attributes:
        length: N, tokens, at least 1.
        head_dim: d, elements per token in each of Q, K, V and O, at least 1.
        sram: M, elements that fit in the small, fast memory, at least 4 d (one row each of Q, K, V and O).
        causal: whether rows see only keys at or before their own position; tiles above the diagonal are then skipped.
        order: "keys-outer" is algorithm 1 of FlashAttention, "rows-outer" that of FlashAttention-2.

    Raises:
        ValueError: a size too small, or an unknown order.

    Source: arXiv 2205.14135, algorithm 1; arXiv 2307.08691, algorithm 1.
    """

    length: int
    head_dim: int
    sram: int
    causal: bool = False
    order: str = "keys-outer"

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length={self.length}: at least 1 token is needed.")
        if self.head_dim < 1:
            raise ValueError(f"head_dim={self.head_dim}: at least 1 element per token is needed.")
        if self.sram < 4 * self.head_dim:
            raise ValueError(
                f"sram={self.sram}: one row each of Q, K, V and O with head_dim {self.head_dim} "
                f"takes {4 * self.head_dim} elements, so sram must be at least {4 * self.head_dim}."
            )
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is unknown: choose one of {', '.join(ORDERS)}.")

    @property
    def block_keys(self) -> int:
        """Bc = ceil(M / 4d), the keys per block; the last block may be shorter."""
        return -(-self.sram // (4 * self.head_dim))

    @property
    def block_rows(self) -> int:
        """Br = min(Bc, d), the query rows per block; Br <= d limits the Br x Bc scores to about M / 4 elements."""
        return min(self.block_keys, self.head_dim)

    @property
    def num_row_blocks(self) -> int:
        """Tr = ceil(N / Br)."""
        return -(-self.length // self.block_rows)

    @property
    def num_key_blocks(self) -> int:
        """Tc = ceil(N / Bc)."""
        return -(-self.length // self.block_keys)

    def rows_of(self, row_block: int) -> range:
        """The query positions of a row block."""
        return range(row_block * self.block_rows, min((row_block + 1) * self.block_rows, self.length))

    def keys_of(self, key_block: int) -> range:
        """The key positions of a key block."""
        return range(key_block * self.block_keys, min((key_block + 1) * self.block_keys, self.length))

    def first_row_block(self, key_block: int) -> int:
        """The first row block with a row that sees a key of this block; all later row blocks have such a row."""
        return self.keys_of(key_block).start // self.block_rows if self.causal else 0

    def last_key_block(self, row_block: int) -> int:
        """The last key block with a key that a row of this block sees."""
        return self.rows_of(row_block)[-1] // self.block_keys if self.causal else self.num_key_blocks - 1

    def tiles(self) -> Iterator[Tile]:
        """The tiles in the order in which they are computed, without the skipped ones."""
        if self.order == "keys-outer":
            for key_block in range(self.num_key_blocks):
                for row_block in range(self.first_row_block(key_block), self.num_row_blocks):
                    yield self._tile(row_block, key_block)
        else:
            for row_block in range(self.num_row_blocks):
                for key_block in range(self.last_key_block(row_block) + 1):
                    yield self._tile(row_block, key_block)

    def _tile(self, row_block: int, key_block: int) -> Tile:
        rows, keys = self.rows_of(row_block), self.keys_of(key_block)
        return Tile(row_block, key_block, rows, keys, masked=self.causal and keys[-1] > rows[0])

    def count(self) -> tuple[int, int, int]:
        """(computed tiles, computed tiles that need a mask, skipped tiles)."""
        computed = masked = 0
        for key_block in range(self.num_key_blocks):
            first = self.first_row_block(key_block)
            computed += self.num_row_blocks - first
            if self.causal:
                # A row block that starts before the last key of the key block has a hidden pair.
                masked += min(self.num_row_blocks, -(-self.keys_of(key_block)[-1] // self.block_rows)) - first
        return computed, masked, self.num_row_blocks * self.num_key_blocks - computed

    def held(self) -> int:
        """Elements in fast memory during the largest step: K, V, Q, O, the scores, and the row maximum and row sum."""
        rows, keys = min(self.block_rows, self.length), min(self.block_keys, self.length)
        return 2 * (rows + keys) * self.head_dim + rows * keys + 2 * rows

    def traffic(self) -> MemoryTraffic:
        """Elements that the forward pass moves between slow and fast memory."""
        n, d = self.length, self.head_dim
        if self.order == "keys-outer":
            # K and V are read once. Each tile reads Q, O, sum and max of its rows, and writes O, sum and max.
            visits = sum(n - self.first_row_block(j) * self.block_rows for j in range(self.num_key_blocks))
            start = n * (d + 2)  # O, sum and max are first written as 0, 0 and -inf
            return MemoryTraffic(read=2 * n * d + visits * (2 * d + 2), written=start + visits * (d + 2))
        # A row block stays in fast memory, so only K and V are read again. O and the lse are written once.
        keys = sum(self.keys_of(self.last_key_block(i)).stop for i in range(self.num_row_blocks))
        return MemoryTraffic(read=n * d + keys * 2 * d, written=n * (d + 1))

    def plain_traffic(self) -> MemoryTraffic:
        """`traffic` of plain attention, which writes and reads the N x N scores and the N x N weights."""
        n, d = self.length, self.head_dim
        return MemoryTraffic(read=3 * n * d + 2 * n * n, written=2 * n * n + n * d)


def floored_blocks(length: int, head_dim: int, sram: int) -> tuple[int, list[int]]:
    """A wrong division of the rows, for comparison: Bc = floor(M / 4d), and an even split into N // Br blocks.

    Returns:
        Br by that rule and the sizes of its blocks: some are larger than Br when Br does not divide N, and there are
        none at all when N or M is too small.
    """
    block = min(sram // (4 * head_dim), head_dim)
    blocks = length // block if block else 0
    return block, [length // blocks + (i < length % blocks) for i in range(blocks)]


def _span(name: str, block: range) -> str:
    return f"{name} {block[0]}" if len(block) == 1 else f"{name}s {block[0]} to {block[-1]}"
