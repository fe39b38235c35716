"""What a plan will cost: bytes moved and bytes held, and the same for the alternatives."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass

import hf_attn_plugins.cqs.planning.difference_covers as covers
from hf_attn_plugins.cqs.planning.scheduler import Plan, plan

MERGE_BLOCK = 4 * 2**20  # bytes of accumulated rows that are merged at a time
MERGE_COPIES = 6  # blocks of this size that merging needs at once
WORKSPACE = 64 * 2**20  # bytes of scores in `kernels.cpu`, which needs the most of all kernels
UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class CallShape:
    """Sizes of one attention call, except the number of tokens.

    Attributes:
        heads, kv_heads, head_dim, head_dim_v, batch: Hq, Hkv, D, Dv and B.
        itemsize: bytes per element of query, key, value and out.
    """

    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    itemsize: int = 2
    batch: int = 1

    @property
    def query_bytes(self) -> int:
        """Bytes of one token's queries."""
        return self.batch * self.heads * self.head_dim * self.itemsize

    @property
    def key_bytes(self) -> int:
        """Bytes of one token's keys and values."""
        return self.batch * self.kv_heads * (self.head_dim + self.head_dim_v) * self.itemsize

    @property
    def result_bytes(self) -> int:
        """Bytes of one token's output, and its lse in float32 (float64 for float64)."""
        return self.batch * self.heads * (self.head_dim_v * self.itemsize + max(4, self.itemsize))

    @property
    def accumulated_bytes(self) -> int:
        """Bytes of one token's output while it is merged, in float32 (float64 for float64)."""
        return self.batch * self.heads * self.head_dim_v * max(4, self.itemsize)


def parse_bytes(size: str | int) -> int:
    """Bytes of "512MiB", "8 GB", "1.5GiB" or a plain number.

    Raises:
        ValueError: the text has another form, or an unknown unit.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(size))
    if match is None or match[2].upper() not in UNITS:
        raise ValueError(f"{size!r} is no amount of memory: write for example 8GiB, 512MiB or a number of bytes.")
    return int(float(match[1]) * UNITS[match[2].upper()])


def format_bytes(count: float) -> str:
    """Bytes in the largest fitting unit: 1536 is "1.50 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1024
    return f"{count:.2f} TiB"


def leaf_sizes(division: Plan) -> tuple[int, int]:
    """(most tokens of a leaf, most tokens of one of its ranges), upper bounds."""
    longest = division.num_tokens
    rows = longest
    for level in division.levels:
        group = -(-longest // level.num_workers)
        longest = min(longest, group * max(len(level.groups(w)) for w in range(level.num_workers)))
        rows = min(rows, group)
    return longest, rows


def gathered_tokens(division: Plan) -> int:
    """Sum of all leaves' tokens. Exact for one level; every further level is counted with its largest quorum."""
    total = sum(division.lengths)
    for level in division.levels[1:]:
        total *= max(len(level.groups(w)) for w in range(level.num_workers))
    return total


def streaming_peak(division: Plan, shape: CallShape, workspace: int) -> int:
    """Bytes held while one worker after another runs, without the inputs and the final result.

    These are: the worker's keys and values twice, since a kernel may copy or pack them; one range of rows with its
    result; the blocks being merged; the kernel's own workspace.
    """
    longest, rows = leaf_sizes(division)
    block = min(MERGE_BLOCK, rows * shape.accumulated_bytes) + shape.accumulated_bytes
    rows_held = rows * (shape.query_bytes + shape.result_bytes)
    return 2 * longest * shape.key_bytes + rows_held + MERGE_COPIES * block + workspace


def streaming_bytes(division: Plan, shape: CallShape) -> int:
    """Bytes moved to and from the computing device: the queries, keys and values of every leaf, and its results."""
    return gathered_tokens(division) * (shape.query_bytes + shape.key_bytes + shape.result_bytes)


def tile_streaming_bytes(num_tokens: int, shape: CallShape, budget: int, workspace: int, is_causal: bool) -> int | None:
    """Bytes moved without a plan: as many rows as fit stay on the device, and all their keys pass tile by tile.

    A row on the device is its query, accumulator and result; two key tiles of 1,024 tokens are there as well. None when
    not even one row fits.
    """
    room = budget - workspace - 2 * min(1024, num_tokens) * shape.key_bytes
    rows = room // (shape.query_bytes + shape.result_bytes + shape.accumulated_bytes)
    if rows < 1:
        return None
    passes = -(-num_tokens // rows)
    seen = num_tokens * passes if not is_causal else sum(min(num_tokens, (i + 1) * rows) for i in range(passes))
    return num_tokens * (shape.query_bytes + shape.result_bytes) + seen * shape.key_bytes


def candidates(num_tokens: int) -> Iterator[tuple[int, ...]]:
    """Worker counts to try, those that gather fewer tokens first: one level of a Singer size, then two levels."""
    sizes = [w for w in (1, *covers.singer_sizes(200)) if w <= max(1, num_tokens)]
    yield from ((w,) for w in sizes)
    pairs = itertools.product(sizes[1:], repeat=2)
    yield from sorted(pairs, key=lambda p: (len(covers.interest_set(p[0])) * len(covers.interest_set(p[1])), p))


def choose(num_tokens: int, shape: CallShape, budget: int, workspace: int) -> Plan:
    """The plan that fits `budget` bytes, `workspace` included, and gathers the fewest tokens.

    Raises:
        ValueError: no plan fits; the message says what the smallest one needs.
    """
    smallest: tuple[int, tuple[int, ...]] | None = None
    for counts in candidates(num_tokens):
        division = plan(num_tokens, counts)
        peak = streaming_peak(division, shape, workspace)
        if peak <= budget:
            return division
        smallest = min(smallest or (peak, counts), (peak, counts))
    assert smallest is not None
    raise ValueError(
        f"a budget of {format_bytes(budget)} is too small for {num_tokens} tokens: the smallest division, workers "
        f"{'x'.join(map(str, smallest[1]))}, needs {format_bytes(smallest[0])}. Raise it, or pass fewer heads."
    )


def across_devices(division: Plan, shape: CallShape) -> dict[str, tuple[float, float]]:
    """Per method: (bytes that a device receives and sends, bytes that it holds), spread over W devices.

    Every device starts with N / W tokens and ends with the result of the same tokens. "one device" moves nothing and
    holds all. In ring attention, keys and values pass from device to device. Ulysses exchanges heads for tokens and
    back, and cannot use more devices than key heads. This counts bytes, not time.
    """
    workers, tokens = division.num_workers, division.num_tokens
    quorum = max(map(len, division.distilled_quorums))
    share, others = tokens / workers, (workers - 1) / workers
    inputs, results = shape.query_bytes + shape.key_bytes, shape.result_bytes
    return {
        "one device": (0.0, tokens * (inputs + results)),
        "CQS": ((quorum - 1) * share * (inputs + results), quorum * share * (inputs + results)),
        "ring": (others * tokens * shape.key_bytes, share * (inputs + shape.key_bytes + results)),
        "Ulysses": (others * share * (inputs + results), share * (inputs + results)),
    }
