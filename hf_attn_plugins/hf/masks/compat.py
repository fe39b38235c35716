"""What Transformers says of a mask, where its versions differ or its names are private: one function each.

tests/hf/test_compat.py looks at each name.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.compat import gone, needed
from hf_attn_plugins.hf.compat import TRANSFORMERS, numbers


@torch.compiler.assume_constant_result
def cuts_wide_masks() -> bool:
    """Whether this version's own attention cuts a mask that is wider than the keys (up to 5.3; Bamba builds such)."""
    import transformers

    return numbers(transformers.__version__) < (5, 4)


def query_range(
    q_length: int | None, q_offset: int | Tensor, cache_position: Tensor | None, kv_length: int, kv_offset: int
) -> tuple[int, int | Tensor]:
    """(number of queries, index of the first one) from what Transformers gives a mask function.

    From 5.4 on it gives `q_length` and `q_offset`; up to 5.3 `cache_position`, (Q,) long, consecutive indices.

    Raises:
        NotImplementedError: neither is given, as no version known here does.
    """
    if q_length is not None and not isinstance(q_length, Tensor):
        # A static cache advances its own counter in place before attention runs.
        return q_length, q_offset.clone() if isinstance(q_offset, Tensor) else q_offset
    position = q_length if cache_position is None else cache_position
    if position is None:
        raise gone(
            "`q_length` or `cache_position` among a mask function's arguments", "build attention masks", *TRANSFORMERS
        )
    count = position.shape[0]
    if kv_length == count and not kv_offset:
        return count, 0  # as many keys as queries: nothing came before, and nothing has to be read from the device
    return count, position[0].clone() if torch.compiler.is_compiling() else int(position[0])


def mask_parts(function: Callable[..., Any]) -> tuple[str, dict[str, Any]] | None:
    """(maker, cells) of a mask function that one of `masking_utils`' makers returned; None for any other function.

    They are closures without public names: told apart by their maker's name, read by the names of their cells.
    `MAKERS` lists the cells that this package reads. A closure from a known maker with other cells gives None as well:
    then attention evaluates the function itself, which is equal and slower.
    """
    closure, code = getattr(function, "__closure__", None), getattr(function, "__code__", None)
    if closure is None or code is None or not function.__module__.startswith("transformers."):
        return None
    maker = function.__qualname__.split(".")[0]
    cells = dict(zip(code.co_freevars, (cell.cell_contents for cell in closure), strict=True))
    return None if MAKERS.get(maker, frozenset()) - set(cells) else (maker, cells)


MAKERS: dict[str, frozenset[str]] = {
    "and_masks": frozenset({"mask_functions"}),
    "or_masks": frozenset({"mask_functions"}),
    "sliding_window_overlay": frozenset({"sliding_window"}),
    "sliding_window_bidirectional_overlay": frozenset({"sliding_window"}),  # from 5.2 on
    "chunked_overlay": frozenset({"chunk_size", "left_padding"}),
    "packed_sequence_mask_function": frozenset({"packed_sequence_mask"}),
    "remap_positions_for_packed_sequence": frozenset({"mask_function", "position_ids"}),
}


def plain_masks() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """(causal, bidirectional): the two mask functions that are not closures."""
    from transformers import masking_utils

    purpose = "recognise causal and bidirectional masks"
    return (
        needed(masking_utils, "causal_mask_function", purpose, *TRANSFORMERS),
        needed(masking_utils, "bidirectional_mask_function", purpose, *TRANSFORMERS),
    )
