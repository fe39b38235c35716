"""What each method costs a rank, counted from the plan it follows: bytes on the wire, bytes held, pairs, cache."""

from __future__ import annotations

from typing import Any

import torch

from hf_attn_plugins.cqs.cost import CallShape
from hf_attn_plugins.parallel.method import Cost, method_for

# The exchanges of a sharded prompt's attention, by the names they are counted under.
EXCHANGES = ("cqs groups", "cqs results", "keys and values", "merge", "anchor")


def costs(name: str, num_tokens: int, num_ranks: int, shape: CallShape, **options: Any) -> list[Cost]:
    """The cost of a prompt without padding on each rank.

    Args:
        name, options: as in `context_parallel`.

    Raises:
        ValueError: an unknown method or option, or a prompt that is too short to be cut for so many ranks.
    """
    chosen: Any = method_for(name, **options)
    real = torch.ones(shape.batch, num_tokens, dtype=torch.bool)
    layouts = [chosen.deal(real, rank, num_ranks) for rank in range(num_ranks)]
    if any(layout is None for layout in layouts):
        raise ValueError(f"{num_tokens} tokens are too few for {name} to be cut for {num_ranks} ranks.")
    return [chosen.cost(layout, rank, shape) for rank, layout in enumerate(layouts)]
