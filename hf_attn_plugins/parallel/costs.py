"""The cost of each method per rank, counted from its plan: bytes sent and received, peak bytes, pairs, cache.

Here it is the cost of a prompt; `turns.costs` counts a later turn.
"""

from __future__ import annotations

from typing import Any

import torch

from hf_attn_plugins.cqs.planning.cost import CallShape
from hf_attn_plugins.parallel.method import Cost, method_for

# Names in `Traffic` of the exchanges that attention over a sharded prompt makes.
EXCHANGES = ("cqs groups", "cqs results", "keys and values", "heads", "heads back", "merge", "anchor", "halo")


def costs(
    name: str, num_tokens: int, num_ranks: int, shape: CallShape, *, layer: int = 0, **options: Any
) -> list[Cost]:
    """The cost of a prompt without padding on each rank.

    Args:
        name, options: as in `context_parallel`.
        num_tokens: length of the prompt.
        num_ranks: number of processes, at least 1.
        shape: heads, head sizes and bytes per element of one layer.
        layer: the layer that is counted; layers differ where options name heads by layer.

    Returns:
        One `Cost` per rank, in the order of the ranks, for one layer.

    Raises:
        ValueError: an unknown method or option, or a prompt that is too short to be divided among `num_ranks` ranks.
    """
    chosen: Any = method_for(name, **options).for_layer(layer)
    real = torch.ones(shape.batch, num_tokens, dtype=torch.bool)
    layouts = [chosen.deal(real, rank, num_ranks) for rank in range(num_ranks)]
    if any(layout is None for layout in layouts):
        raise ValueError(
            f"{num_tokens} tokens are too few for {name} to be cut for {num_ranks} ranks: take a longer prompt or "
            "fewer ranks."
        )
    return [chosen.cost(layout, rank, shape) for rank, layout in enumerate(layouts)]
