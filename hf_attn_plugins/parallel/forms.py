"""The forms in which the methods run on several ranks, and the cost of ring attention by its formula.

A form is a method with the options that change what it exchanges: tiled gathers keys or exchanges heads, star has near
tokens or not.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hf_attn_plugins.cqs.planning.cost import CallShape
from hf_attn_plugins.parallel.method import Cost, triangle
from hf_attn_plugins.parallel.partition import contiguous


@dataclass(frozen=True)
class Form:
    """A row of the tables.

    Attributes:
        label: how the row is called.
        name: the plugin; None for a method that this package does not run, counted by its formula.
        exact: whether the results are those of dense attention.
        options: what the form fixes.
    """

    label: str
    name: str | None
    exact: bool
    options: dict[str, Any] = field(default_factory=dict)


FORMS = (
    Form("tiled, gather", "tiled_attention", True, {"exchange": "gather"}),
    Form("tiled, heads (Ulysses)", "tiled_attention", True, {"exchange": "heads"}),
    Form("cqs", "cqs_attention", True),
    Form("ring (formula)", None, True),
    Form("star, paper", "star_attention", False, {"preset": "paper"}),
    Form("star, near tokens", "star_attention", False),
)


def ring(num_tokens: int, num_ranks: int, shape: CallShape) -> list[Cost]:
    """The cost of ring attention per rank: keys and values pass through all ranks, one shard at a time.

    Tokens are dealt so that every rank computes the same number of pairs (zig-zag). While a rank attends to one shard,
    the next one arrives, so it holds two. Source: Ring Attention, arXiv 2310.01889.
    """
    shards = [len(run) for run in contiguous(num_tokens, num_ranks)]
    moved = (num_ranks - 1) * max(shards) * shape.key_bytes
    return [
        Cost(
            sent=moved,
            received=moved,
            held=shard * (shape.query_bytes + shape.key_bytes + shape.result_bytes)
            + (2 * max(shards) * shape.key_bytes if num_ranks > 1 else 0),
            pairs=triangle(num_tokens) // num_ranks,
            rows=shard,
            cache=shard * shape.key_bytes,
            decode=(num_ranks - 1) * shape.result_bytes,
        )
        for shard in shards
    ]
