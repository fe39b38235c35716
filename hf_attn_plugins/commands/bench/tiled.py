"""`hf-attn bench tiled`: times of `attend` and of `F.scaled_dot_product_attention`, measured in one run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn_plugins.bench.timing import medians, write_table
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.kernels.attend import attend
from hf_attn_plugins.kernels.choose import choose

HEADS = ((8, 8), (9, 3))


def run(arguments: argparse.Namespace) -> None:
    """Measure, print row by row, write the table.

    Raises:
        ValueError: a length, a head dim or the repeats are below 1.
    """
    if min([*arguments.lengths, *arguments.short, arguments.repeats, *arguments.head_dims], default=0) < 1:
        raise ValueError("--lengths, --short, --head-dims and --repeats must be at least 1.")
    rows: list[dict[str, Any]] = []

    def measure(**case: Any) -> None:
        rows.append(_measure(repeats=arguments.repeats, **case))
        print(
            "  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), flush=True
        )

    for length in [*arguments.short, *arguments.lengths]:
        for heads in HEADS:
            for head_dim in arguments.head_dims:
                for causal in (False, True):
                    backward = length <= arguments.backward_up_to and length in arguments.lengths
                    measure(dtype=torch.bfloat16, heads=heads, head_dim=head_dim, rows=length, keys=length,
                            causal=causal, backward=backward)  # fmt: skip
    for length in [*arguments.short, *arguments.lengths[:1]]:
        for causal in (False, True):
            measure(dtype=torch.float32, heads=HEADS[0], head_dim=64, rows=length, keys=length, causal=causal,
                    backward=False)  # fmt: skip
    for dtype in (torch.bfloat16, torch.float32):
        for heads in HEADS:
            measure(dtype=dtype, heads=heads, head_dim=64, rows=1, keys=arguments.decode_keys, causal=True,
                    backward=False)  # fmt: skip
    notes = (
        "Ratios: seconds of `F.scaled_dot_product_attention` divided by seconds of `attend`, both medians of "
        f"{arguments.repeats} in the same run; above 1 `attend` is faster. `kernel` is what `kernels.choose` chose. "
        "GFLOP/s counts the attended (query, key) pairs only."
    )
    print("written to", write_table(arguments.out, "tiled", "Tiled attention against PyTorch's attention", rows, notes))


def _measure(
    *, repeats: int, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, rows: int, keys: int, causal: bool,
    backward: bool,
) -> dict[str, Any]:  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads[0], rows, head_dim, generator=generator).to(dtype)
    key, value = (torch.randn(1, heads[1], keys, head_dim, generator=generator).to(dtype) for _ in range(2))
    square = causal and rows == keys

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=square, enable_gqa=heads[0] != heads[1])

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, is_causal=causal).out

    count = max(repeats, 50) if rows * keys < 2**22 else repeats  # short calls vary more, and more of them take no time
    with torch.no_grad():
        forward = medians({"sdpa": lambda: sdpa(query, key, value), "ours": lambda: ours(query, key, value)}, count)
    cells = rows * keys / (2 if square else 1)
    mask, cut = Mask(causal=causal).trimmed(rows, keys)
    row: dict[str, Any] = {
        "dtype": str(dtype).removeprefix("torch."),
        "heads": f"{heads[0]}:{heads[1]}",
        "head_dim": head_dim,
        "rows": rows,
        "keys": keys,
        "mask": "causal" if causal else "full",
        "kernel": choose(query, key[:, :, cut], value[:, :, cut], mask, None, 0.0).name,
        "SDPA GFLOP/s": round(4 * heads[0] * head_dim * cells / forward["sdpa"] / 1e9),
        "ours GFLOP/s": round(4 * heads[0] * head_dim * cells / forward["ours"] / 1e9),
        "forward ratio": forward["sdpa"] / forward["ours"],
        "forward+backward ratio": "",
    }
    if backward:
        leaves = [x.requires_grad_() for x in (query, key, value)]
        grad = torch.randn_like(query)

        def step(function: Callable[..., Tensor]) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(function(*leaves), leaves, grad)

        both = medians({"sdpa": step(sdpa), "ours": step(ours)}, repeats)
        row["forward+backward ratio"] = both["sdpa"] / both["ours"]
    return row
