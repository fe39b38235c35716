"""`hf-attn bench gpu`: check the results of the Triton kernels on a CUDA or ROCm GPU, then time them."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn_plugins.bench.gpu_timing import matrix_peak, medians_ms
from hf_attn_plugins.bench.hardware import describe
from hf_attn_plugins.bench.timing import markdown_table
from hf_attn_plugins.core.mask import Mask, padding_from_lengths
from hf_attn_plugins.kernels.attend import attend
from hf_attn_plugins.testing import allowed_error, dense_attention

HIDDEN, TOKENS = 2048, 16384  # heads x head_dim, and the smallest batch x length


class Case(NamedTuple):
    """One timed shape; `what` is forward, backward (forward and backward together) or decode."""

    what: str
    length: int
    head_dim: int
    causal: bool

    def flops(self) -> float:
        """FLOPs of the matrix products: 2 products forward, 5 backward; half of them for causal attention."""
        if self.what == "decode":
            return 4.0 * 32 * self.length * self.head_dim
        batch = max(1, TOKENS // self.length)
        pairs = batch * (HIDDEN // self.head_dim) * self.length**2 / (2 if self.causal else 1)
        return 4.0 * pairs * self.head_dim * (3.5 if self.what == "backward" else 1.0)


def run(arguments: argparse.Namespace) -> int:
    """Check the results, tune if `--tune` is given, time and write the table.

    Returns:
        0, or 1 where a result is wrong: then nothing is timed.

    Raises:
        ValueError: there is no GPU, or a length, a head dim or the repeats are below 1.
    """
    if not torch.cuda.is_available():
        raise ValueError("there is no CUDA or ROCm device: `hf-attn bench triton --static` needs none.")
    if min([*arguments.lengths, *arguments.head_dims, arguments.repeats]) < 1:
        raise ValueError("--lengths, --head-dims and --repeats must be at least 1.")
    device, began = torch.device("cuda", torch.cuda.current_device()), time.monotonic()
    right = True
    for line in correctness(device):
        print(line, flush=True)
        right &= line.startswith("right")
    if not right:
        return 1
    if arguments.tune:
        from hf_attn_plugins.commands.bench.gpu_tune import tune

        tune(arguments.tune, device, arguments.head_dims, began + 60 * arguments.minutes / 2)
    peak = matrix_peak(device)
    print(f"bfloat16 matrix product: {peak:.0f} TFLOP/s", flush=True)
    rows = measure(arguments, device, peak, began + 60 * arguments.minutes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts = describe(device) | {
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "peak_tflops": peak,
    }
    (arguments.out / "gpu.json").write_text(
        json.dumps({"hardware": facts, "rows": rows}, indent=1) + "\n", encoding="utf-8"
    )
    page = [
        "# Attention on a GPU",
        "",
        ", ".join(f"{name} {value}" for name, value in facts.items()),
        "",
        *markdown_table(rows),
        "",
    ]
    (arguments.out / "gpu.md").write_text("\n".join(page), encoding="utf-8")
    return 0


def correctness(device: torch.device, length: int = 1000, heads: tuple[int, int] = (8, 2)) -> Iterator[str]:
    """One line per feature and dtype: errors of out and gradients from float64, and what the error rule allows.

    A line starts with "right" or "WRONG".
    """
    lengths = torch.tensor([length, length // 3], device=device)
    right, left = (padding_from_lengths(lengths, length, side) for side in ("right", "left"))
    packed = torch.arange(length, device=device).mul(5).div(length, rounding_mode="floor").expand(2, length)
    features: dict[str, tuple[int, int, float | None, Mask]] = {
        "causal": (length, 128, None, Mask(causal=True)),
        "full, head_dim 64": (length, 64, None, Mask()),
        "head_dim 96": (length, 96, None, Mask(causal=True)),
        "head_dim 256": (length, 256, None, Mask(causal=True)),
        "window": (length, 128, None, Mask(causal=True, window=(200, None))),
        "right padding": (length, 128, None, Mask(causal=True, key_padding=right)),
        "left padding": (length, 64, None, Mask(causal=True, key_padding=left)),
        "segments": (length, 128, None, Mask(causal=True, query_segments=packed, key_segments=packed)),
        "prefix": (length, 64, None, Mask(causal=True, prefix=77)),
        "softcap": (length, 128, 20.0, Mask(causal=True)),
        "decode": (1, 128, None, Mask(causal=True)),
        "decode, 5 rows, offset in a tensor": (5, 64, None, Mask(causal=True, offset=torch.tensor(700, device=device))),
    }
    for name, (rows, head_dim, softcap, mask) in features.items():
        for dtype in (torch.bfloat16, torch.float32):
            yield _check(name, (rows, length), heads, head_dim, softcap, mask, dtype, device)


def _check(
    name: str, shape: tuple[int, int], heads: tuple[int, int], head_dim: int, softcap: float | None, mask: Mask,
    dtype: torch.dtype, device: torch.device,
) -> str:  # fmt: skip
    generator, (rows, keys) = torch.Generator(device).manual_seed(0), shape

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device, dtype=torch.float64)

    query, key, value = (draw(2, h, n, head_dim) for h, n in ((heads[0], rows), (heads[1], keys), (heads[1], keys)))
    inputs, weight = [x.to(dtype) for x in (2 * query, 2 * key, value)], draw(2, heads[0], rows, head_dim)
    t, s = torch.arange(rows, device=device), torch.arange(keys, device=device)
    seen = mask.visible(t, s, mask.start(rows, keys), 2)
    results = []
    for kind in (torch.float64, dtype, None):
        leaves = [x.to(kind or dtype).detach().requires_grad_() for x in inputs]
        if kind is None:
            out = attend(*leaves, mask=mask, softcap=softcap, kernel="triton").out
        else:
            out = dense_attention(leaves[0], leaves[1], leaves[2], seen, softcap=softcap)[0]
        results.append([out.detach(), *torch.autograd.grad((out * weight.to(out.dtype)).sum(), leaves)])
    words, good = [], True
    for which, ref, low, ours in zip(("out", "dq", "dk", "dv"), *results, strict=True):
        factor = 3.0 if which != "out" or softcap else 2.0
        error, limit = float((ours.double() - ref).abs().max()), allowed_error(low, ref, factor)
        good &= error <= limit
        words.append(f"{which} {error:.1e} (allowed {limit:.1e})")
    return f"{'right' if good else 'WRONG'}: {name}, {str(dtype)[6:]}: {', '.join(words)}"


def cases(lengths: list[int], head_dims: list[int]) -> list[Case]:
    """The timed cases, the most important ones first: a time limit skips the last ones."""
    timed = [Case("forward", n, d, True) for d in reversed(head_dims) for n in lengths]
    timed += [Case("decode", n, d, True) for d in reversed(head_dims) for n in lengths]
    timed += [Case("backward", n, d, True) for d in reversed(head_dims) for n in lengths]
    timed += [Case("forward", n, d, False) for d in reversed(head_dims) for n in lengths]
    middle = [case for case in timed if 4096 <= case.length <= 32768]
    return middle + [case for case in timed if case not in middle]


def measure(arguments: argparse.Namespace, device: torch.device, peak: float, deadline: float) -> list[dict[str, Any]]:
    """Time the cases until the deadline; print each row when it is measured."""
    rows = []
    for case in cases(arguments.lengths, arguments.head_dims):
        if time.monotonic() > deadline:
            print(f"time is up: {case} and the cases after it were not run", flush=True)
            break
        found, failed = time_case(case, device, arguments.repeats)
        best = min((ms for name, ms in found.items() if name.startswith("sdpa")), default=float("nan"))
        ours = found.get("triton", float("nan"))
        rate = case.flops() / ours / 1e9
        row: dict[str, Any] = case._asdict() | {
            "triton_ms": ours, "tflops": rate, "share_of_peak": rate / peak, "speed_over_best_sdpa": best / ours,
        }  # fmt: skip
        row |= {f"{name}_ms": found.get(name, failed.get(name)) for name in alternatives(case) if name != "triton"}
        rows.append(row)
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()), flush=True)
    return rows


def time_case(case: Case, device: torch.device, repeats: int) -> tuple[dict[str, float], dict[str, str]]:
    """Median milliseconds by alternative, and the error text of each alternative that could not run."""
    if case.what == "decode":
        shapes = [(1, 32, 1), (1, 8, case.length), (1, 8, case.length)]
    else:
        shapes = [(max(1, TOKENS // case.length), HIDDEN // case.head_dim, case.length)] * 3
    inputs = []
    for _ in range(3):
        given = [torch.randn(*shape, case.head_dim, device=device, dtype=torch.bfloat16) for shape in shapes]
        inputs.append([x.requires_grad_(case.what == "backward") for x in given])
    runs = alternatives(case)
    if case.what == "backward":
        runs = {name: _with_backward(run) for name, run in runs.items()}
    return medians_ms(runs, inputs, device, repeats)


def _with_backward(run: Callable[..., Tensor]) -> Callable[..., Any]:
    def both(*inputs: Tensor) -> Any:
        out = run(*inputs)
        return torch.autograd.grad(out, inputs, out)

    return both


def alternatives(case: Case) -> dict[str, Callable[..., Tensor]]:
    """Our kernels, SDPA's flash and cuDNN backends, compiled FlexAttention, and flash-attn if it is installed."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    causal = case.causal and case.what != "decode"  # the last row sees every key
    grouped = case.what == "decode"

    def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)

        return run

    runs: dict[str, Callable[..., Tensor]] = {
        "triton": lambda q, k, v: attend(q, k, v, is_causal=causal, kernel="triton").out,
        "sdpa_flash": sdpa(SDPBackend.FLASH_ATTENTION),
        "sdpa_cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
        "flex": _flex(case, causal),
    }
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return runs
    runs["flash_attn"] = lambda q, k, v: flash_attn_func(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal
    ).transpose(1, 2)
    return runs


def _flex(case: Case, causal: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    prepared: dict[str, Any] = {}

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not prepared:
            rows, keys = query.shape[2], key.shape[2]
            prepared["mask"] = (
                create_block_mask(lambda b, h, q, k: q >= k, None, None, rows, keys, device=str(query.device))
                if causal
                else None
            )
            prepared["call"] = torch.compile(flex_attention)
        return prepared["call"](query, key, value, block_mask=prepared["mask"], enable_gqa=case.what == "decode")

    return run
