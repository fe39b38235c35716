"""`hf-attn bench tiled`: times of `attend` and of `F.scaled_dot_product_attention`, measured in one run."""

from __future__ import annotations

import argparse
import importlib
import itertools
import statistics
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn_plugins.bench.timing import rounds, spread, write_table
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.kernels.attend import attend
from hf_attn_plugins.kernels.choose import choose

HEADS = ((8, 8), (9, 3))
PRODUCT = 1024  # rows and columns of the matrix product that is timed beside every case


def run(arguments: argparse.Namespace) -> None:
    """Measure, print row by row, write the table.

    Raises:
        ValueError: a length, a head dim or the repeats are below 1.
        ImportError: what --against names is not installed.
    """
    if min([*arguments.lengths, *arguments.short, arguments.repeats, *arguments.head_dims], default=0) < 1:
        raise ValueError("--lengths, --short, --head-dims and --repeats must be at least 1.")
    rows: list[dict[str, Any]] = []
    rivals = {name: _rival(name) for name in arguments.against}

    def measure(**case: Any) -> None:
        rows.append(_measure(repeats=arguments.repeats, rivals=rivals, **case))
        print(
            "  ".join(f"{k} {v:.2f}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()), flush=True
        )

    dtypes = [getattr(torch, name) for name in arguments.dtypes]
    sizes = itertools.product(dtypes, [*arguments.short, *arguments.lengths], HEADS, arguments.head_dims, (False, True))
    for dtype, length, heads, head_dim, causal in sizes:
        backward = length <= arguments.backward_up_to and length in arguments.lengths
        measure(dtype=dtype, heads=heads, head_dim=head_dim, rows=length, keys=length, causal=causal, backward=backward)
    for dtype, heads in itertools.product(dtypes, HEADS):
        measure(dtype=dtype, heads=heads, head_dim=64, rows=1, keys=arguments.decode_keys, causal=True, backward=False)
    notes = (
        "Ratios: seconds of `F.scaled_dot_product_attention` divided by seconds of `attend`, both medians of "
        f"{arguments.repeats} rounds (50 for short calls) of the same run; above 1 `attend` is faster. `spread`: the "
        "smallest and the largest ratio of one round. `kernel` is what `kernels.choose` chose. GFLOP/s counts the "
        f"attended (query, key) pairs only; `product` is a product of two {PRODUCT} x {PRODUCT} matrices of the row's "
        "dtype in the same rounds."
    )
    if rivals:
        notes += (
            " `over zentorch`: seconds of `torch.ops.zentorch.zentorch_sdpa` (version "
            f"{version('zentorch')}) divided by those of `attend`; keys of grouped heads were repeated for it before."
        )
    print("written to", write_table(arguments.out, "tiled", "Tiled attention against PyTorch's attention", rows, notes))


def _rival(name: str) -> Callable[[Tensor, Tensor, Tensor, bool], Tensor]:
    """Another library's attention, (query, key, value, is_causal) -> out; all have equally many heads."""
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'--against {name} needs it: pip install "hf-attn-plugins[bench]".') from error
    return lambda query, key, value, causal: torch.ops.zentorch.zentorch_sdpa(query, key, value, 0.0, causal)[0]


def _measure(
    *,
    repeats: int,
    rivals: dict[str, Callable[..., Tensor]],
    dtype: torch.dtype,
    heads: tuple[int, int],
    head_dim: int,
    rows: int,
    keys: int,
    causal: bool,
    backward: bool,
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, heads[0], rows, head_dim, generator=generator).to(dtype)
    key, value = (torch.randn(1, heads[1], keys, head_dim, generator=generator).to(dtype) for _ in range(2))
    square = causal and rows == keys

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=square, enable_gqa=heads[0] != heads[1])

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, is_causal=causal).out

    alike = [x.repeat_interleave(heads[0] // heads[1], 1) for x in (key, value)]
    square_matrix = torch.randn(PRODUCT, PRODUCT, generator=generator).to(dtype)
    alternatives: dict[str, Callable[[], Any]] = {
        "sdpa": lambda: sdpa(query, key, value),
        "ours": lambda: ours(query, key, value),
        "product": lambda: square_matrix @ square_matrix,
        **{name: lambda run=run: run(query, *alike, square) for name, run in rivals.items()},  # type: ignore[misc]
    }
    count = max(repeats, 50) if rows * keys < 2**22 else repeats  # short calls vary more, and more of them take no time
    with torch.no_grad():
        seconds = rounds(alternatives, count)
    forward = {name: statistics.median(times) for name, times in seconds.items()}
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
        "product GFLOP/s": round(2 * PRODUCT**3 / forward["product"] / 1e9),
        "forward ratio": forward["sdpa"] / forward["ours"],
        "spread": spread(seconds["sdpa"], seconds["ours"]),
        **{f"over {name}": forward[name] / forward["ours"] for name in rivals},
        "forward+backward ratio": "",
        "spread, both": "",
    }
    if backward:
        leaves = [x.requires_grad_() for x in (query, key, value)]
        grad = torch.randn_like(query)

        def step(function: Callable[..., Tensor]) -> Callable[[], Any]:
            return lambda: torch.autograd.grad(function(*leaves), leaves, grad)

        both = rounds({"sdpa": step(sdpa), "ours": step(ours)}, repeats)
        row["forward+backward ratio"] = statistics.median(both["sdpa"]) / statistics.median(both["ours"])
        row["spread, both"] = spread(both["sdpa"], both["ours"])
    return row
