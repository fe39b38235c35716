"""`hf-attn bench decode`: one step of decoding, `attend` against `F.scaled_dot_product_attention`, in one run."""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn_plugins.bench.timing import rounds, spread, write_table
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.kernels.attend import attend
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
        "Ratio: seconds of `F.scaled_dot_product_attention` divided by seconds of `attend`, both medians of "
        f"{arguments.repeats} rounds of the same run; above 1 `attend` is faster. `spread`: the smallest and the "
        f"largest ratio of one round. head_dim {HEAD_DIM}. Rows behind the first see one key more each. Padding is on "
        "the left, the 8th part of the keys at most; SDPA gets it as Transformers gives it, a mask tensor. `kernel` is "
        "what `kernels.choose` chose."
    )
    print("written to", write_table(arguments.out, "decode", "One step of decoding against PyTorch", rows, notes))


def _measure(
    dtype: torch.dtype, heads: tuple[int, int], batch: int, rows: int, padded: bool, keys: int, repeats: int
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads[0], rows, HEAD_DIM, generator=generator).to(dtype)
    key, value = (torch.randn(batch, heads[1], keys, HEAD_DIM, generator=generator).to(dtype) for _ in range(2))
    mask, tensor = Mask(causal=True), None
    if padded:
        first = torch.arange(batch).unsqueeze(-1) * (keys // 8) // batch
        mask = mask.replace(key_padding=torch.arange(keys) >= first)
    if padded or rows > 1:
        tensor = mask.visible(torch.arange(rows), torch.arange(keys), keys - rows, batch)

    def sdpa() -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=tensor, enable_gqa=heads[0] != heads[1])

    with torch.no_grad():
        seconds = rounds({"sdpa": sdpa, "ours": lambda: attend(query, key, value, mask=mask)}, repeats)
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
