"""The plan of Star Attention: which tokens are anchor, block and query, and who may attend to whom. Integers only."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# Sizes for prompts that come without any, by `hf-attn bench front` on SmolLM2-135M (benchmarks/results/front.md):
# small blocks with near tokens lose far less than large blocks at the same speed.
DENSE_BELOW = 2048  # tokens: attention is a small part of shorter prompts' cost
NEAR_BLOCK = 128  # a tile of rows on GPUs, two on CPUs
NEAR_ANCHOR = 64
HALO_PART, HALO_STEP = (3, 16), 64  # of the prompt, and what the halo is a multiple of
DEFAULT_QUERY = 128
# The preset "paper": large blocks without near tokens. A quarter of the prompt a block, after passkeys asked of
# SmolLM2-135M, where that cost little and an eighth cost much (`hf-attn bench star`).
PAPER = "paper"
PAPER_BLOCKS = 4  # blocks a prompt is cut into
PAPER_STEP = 256  # a block is a multiple of this
ANCHOR_SHARE = 4  # without a halo, the anchor is a block divided by this


@dataclass(frozen=True)
class Plan:
    """A prompt of `length` tokens in blocks, with an anchor and a query (arXiv 2411.17116, section 2).

    The last `query_size` tokens are the query and attend to everything before them (phase 2). The tokens before are the
    context, cut into blocks of `block_size`, the last one ragged: token i attends to j <= i when j < anchor_size or
    j >= start of i's block - halo_size (phase 1). A plan whose blocks all see everything is dense attention.

    A halo of 0 is the paper's plan. Small blocks with a halo come close to a sliding window with first tokens.

    Attributes:
        length: tokens of the prompt, context and query together.
        block_size: tokens of a block, at least 1.
        anchor_size: leading tokens that every block attends to, 0 (no anchor) .. block_size + halo_size.
        query_size: tokens of the query; a query as long as the prompt, or longer, makes everything dense.
        halo_size: tokens just before a block that the block attends to as well; any number, longer than a block too.

    Raises:
        ValueError: a size out of its range; the message says which.
    """

    length: int
    block_size: int
    anchor_size: int
    query_size: int = 0
    halo_size: int = 0

    def __post_init__(self) -> None:
        for name in ("length", "block_size", "anchor_size", "query_size", "halo_size"):
            value, least = getattr(self, name), int(name == "block_size")
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: a whole number of at least {least} is needed.")
        check_anchor(self.anchor_size, self.block_size, self.halo_size)

    @property
    def context(self) -> int:
        """Tokens before the query."""
        return max(0, self.length - self.query_size)

    @property
    def num_blocks(self) -> int:
        return -(-self.context // self.block_size)

    @property
    def is_dense(self) -> bool:
        """Whether the plan is plain causal attention."""
        return self.dense_end >= self.context

    @property
    def dense_end(self) -> int:
        """Tokens of the first blocks, which see everything before them: anchor and halo leave no gap."""
        blocks = (self.anchor_size + self.halo_size) // self.block_size + 1
        return min(blocks * self.block_size, self.context)

    def block(self, index: int) -> range:
        """Positions of block `index`; the last block ends with the context, unpadded."""
        return range(index * self.block_size, min((index + 1) * self.block_size, self.context))

    def near(self, index: int) -> range:
        """Positions that block `index` sees beside the anchor: its halo, then its own."""
        block = self.block(index)
        return range(max(0, block.start - self.halo_size), block.stop)

    def blocks(self) -> Iterator[range]:
        return (self.block(index) for index in range(self.num_blocks))

    @property
    def anchor(self) -> range:
        return range(min(self.anchor_size, self.context))

    @property
    def query(self) -> range:
        return range(self.context, self.length)

    def phase(self, position: int, key: int) -> int:
        """Phase in which the token at `position` attends to `key`: 1, 2, or 0 where it may not."""
        if not 0 <= key <= position < self.length:
            return 0
        if position >= self.context:
            return 2
        return int(key < self.anchor_size or key in self.near(position // self.block_size))

    def may_attend(self, position: int, key: int) -> bool:
        """Whether the token at `position` may attend to the token at `key`."""
        return self.phase(position, key) > 0

    def attended_pairs(self) -> int:
        """Number of (position, key) pairs attended, in closed form."""
        whole = max(0, self.num_blocks - 1)
        last = self.context - whole * self.block_size
        own = whole * (self.block_size * (self.block_size + 1) // 2) + last * (last + 1) // 2
        # Block b sees min(b * block_size, halo + anchor) tokens before it: all of them in the first `full` blocks.
        before = self.halo_size + self.anchor_size
        full = min(whole, before // self.block_size)
        earlier = self.block_size**2 * (full * (full + 1) // 2) + self.block_size * (whole - full) * before
        if whole:  # the last block has `last` rows instead of a whole block's
            earlier -= (self.block_size - last) * min(whole * self.block_size, before)
        query = len(self.query)
        return own + earlier + query * self.context + query * (query + 1) // 2

    def causal_pairs(self) -> int:
        """Number of pairs that dense causal attention attends."""
        return self.length * (self.length + 1) // 2

    def extended(self, length: int) -> Plan:
        """The plan of a longer context with the same sizes; the blocks that are whole here stay what they are."""
        return Plan(length, self.block_size, self.anchor_size, self.query_size, self.halo_size)


def check_anchor(anchor_size: int | None, block_size: int | None, halo_size: int | None = 0) -> None:
    """Raise ValueError for an anchor longer than the first block and its halo, which would be denser than it says."""
    if anchor_size is None or block_size is None:
        return
    if anchor_size > block_size + (halo_size or 0):
        beside = f" and halo_size={halo_size}" if halo_size else ""
        raise ValueError(
            f"anchor_size={anchor_size} is larger than block_size={block_size}{beside}: the anchor is the head of the "
            "first block, so use anchor_size <= block_size + halo_size."
        )


def plan_for(
    length: int,
    block_size: int | None = None,
    anchor_size: int | None = None,
    query_size: int | None = None,
    halo_size: int | None = None,
    preset: str | None = None,
) -> Plan:
    """The plan of a prompt, with sizes that were not given filled in from its length.

    Without a block size: prompts below `DENSE_BELOW` tokens are one block, longer ones are cut into small blocks with
    near tokens, or into `PAPER_BLOCKS` blocks by the preset "paper". Sizes given alone are the paper's: where there is
    a block size and no halo, the halo is 0.

    Raises:
        ValueError: as `Plan`; a given anchor_size also needs to fit the default block and halo.
    """
    given = {"block_size": block_size, "anchor_size": anchor_size, "query_size": query_size, "halo_size": halo_size}
    for name, value in given.items():
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise ValueError(f"{name}={value!r}: a whole number is needed, or None for the default.")
    query = DEFAULT_QUERY if query_size is None else query_size
    paper = preset == PAPER or (block_size is not None and halo_size is None)
    if halo_size is None:
        halo_size = 0 if paper or length < DENSE_BELOW else default_halo(length)
    if block_size is None:
        block_size = max(1, length)
        if length >= DENSE_BELOW:
            block_size = paper_block(max(1, length - query)) if paper else NEAR_BLOCK
        block_size = max(block_size, (anchor_size or 0) - halo_size)
    if anchor_size is None:
        anchor_size = min(NEAR_ANCHOR, block_size + halo_size) if halo_size else block_size // ANCHOR_SHARE
    return Plan(length, block_size, anchor_size, query, halo_size)


def default_halo(length: Any) -> Any:
    """Near tokens of a prompt (or of a tensor of prompts' lengths) that comes without sizes."""
    part, whole = HALO_PART
    return length * part // whole // HALO_STEP * HALO_STEP


def paper_block(context: Any) -> Any:
    """Tokens of a block by the preset "paper"; `context` is a number of tokens from 1 on, or a tensor of them."""
    share = -(-context // PAPER_BLOCKS)
    return -(-share // PAPER_STEP) * PAPER_STEP
