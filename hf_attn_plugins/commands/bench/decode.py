"""`hf-attn bench decode`: one layer's step of decoding, `tiled_attention` against `sdpa`, in one run."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_attn_plugins.bench.timing import rounds, spread, write_table
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.hf.masks.structured_mask import Structure, travelling
from hf_attn_plugins.kernels.choose import choose

HEADS = ((8, 8), (8, 4), (9, 3), (32, 8))
HEAD_DIM = 64
# (prompts, rows of each, whether prompts are padded to one length)
CALLS = ((1, 1, False), (1, 4, False), (4, 1, True))


def run(arguments: argparse.Namespace) -> None:
    """Measure, print row by row, write the table.

    Raises:
        ValueError: a number of keys is below 64, or the repeats are below 1.
    """
    if min(arguments.keys) < 64 or arguments.repeats < 1:
        raise ValueError("--keys must be at least 64 and --repeats at least 1.")
    rows: list[dict[str, Any]] = []
    for dtype in (getattr(torch, name) for name in arguments.dtypes):
        for heads in HEADS:
            for call in CALLS:
                for keys in arguments.keys:
                    rows.append(_measure(dtype, heads, *call, keys, arguments.repeats))
                    shown = (f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items())
                    print("  ".join(shown), flush=True)
    notes = (
        "Ratio: seconds of Transformers' function for `sdpa` divided by seconds of that for `tiled_attention`, both "
        f"medians of {arguments.repeats} rounds of the same run, called as a layer calls them; above 1 "
        "`tiled_attention` is faster. `spread`: the smallest and the largest ratio of one round. "
        f"head_dim {HEAD_DIM}. Rows behind the first see one key more each. Padding is on the left, an 8th of the "
        "keys at most. `kernel` is what `kernels.choose` chose."
    )
    print("written to", write_table(arguments.out, "decode", "One layer's step of decoding", rows, notes))


class Layer(nn.Module):
    """What the functions read of an attention layer."""

    is_causal = True

    def __init__(self, group_size: int) -> None:
        super().__init__()
        self.num_key_value_groups = group_size


def _measure(
    dtype: torch.dtype, heads: tuple[int, int], batch: int, rows: int, padded: bool, keys: int, repeats: int
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads[0], rows, HEAD_DIM, generator=generator).to(dtype)
    key, value = (torch.randn(batch, heads[1], keys, HEAD_DIM, generator=generator).to(dtype) for _ in range(2))
    mask = Mask(causal=True)
    if padded:
        first = torch.arange(batch).unsqueeze(-1) * (keys // 8) // batch
        mask = mask.replace(key_padding=torch.arange(keys) >= first)
    structure = Structure(mask, (batch, 1, rows, keys), True, ("causal",), skippable=rows == 1 and not padded)
    masks = {"sdpa": None if structure.skippable else structure.tensor(query.device), "ours": travelling(structure)}
    module = Layer(heads[0] // heads[1])

    def call(name: str, function: Any) -> Callable[[], Any]:
        return lambda: function(module, query, key, value, masks[name], scaling=HEAD_DIM**-0.5, dropout=0.0)

    sdpa, ours = (ALL_ATTENTION_FUNCTIONS[name] for name in ("sdpa", "tiled_attention"))
    with torch.no_grad():
        seconds = rounds({"sdpa": call("sdpa", sdpa), "ours": call("ours", ours)}, repeats)
    trimmed, _ = mask.trimmed(rows, keys)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "heads": f"{heads[0]}:{heads[1]}",
        "prompts": f"{batch}, padded" if padded else batch,
        "rows": rows,
        "keys": keys,
        "kernel": choose(query, key, value, trimmed, None, 0.0).name,
        "ratio": statistics.median(seconds["sdpa"]) / statistics.median(seconds["ours"]),
        "spread": spread(seconds["sdpa"], seconds["ours"]),
    }
