"""`hf-attn bench gpu`, second part: the shapes that are timed, the most important ones first, and how."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn_plugins.bench.gpu_timing import medians_ms
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.kernels.attend import attend
from hf_attn_plugins.star.entry import attention as star_attention
from hf_attn_plugins.star.options import StarOptions
from hf_attn_plugins.star.rectangles import rectangles_of

HIDDEN, TOKENS = 2048, 16384  # heads x head_dim, and the smallest batch x length
DECODE_HEADS = (32, 8)
OURS, DEFAULT = "triton", "default"  # our kernels, and what a user gets without naming one
SDPA, FLEX = ("flash", "cudnn", "efficient"), "flex"


class Case(NamedTuple):
    """One timed shape; `what` is forward, plan (star), decode or backward (forward and backward together)."""

    what: str
    length: int
    head_dim: int
    causal: bool

    @property
    def name(self) -> str:
        """The step's name in the record, such as "forward, 4096 tokens, head_dim 128, causal"."""
        return f"{self.what}, {self.length} tokens, head_dim {self.head_dim}, {'causal' if self.causal else 'full'}"

    def flops(self) -> float:
        """FLOPs of the matrix products: 2 products forward, 5 backward; half of them for causal attention."""
        if self.what == "decode":
            return 4.0 * DECODE_HEADS[0] * self.length * self.head_dim
        batch = max(1, TOKENS // self.length)
        pairs = batch * (HIDDEN // self.head_dim) * self.length**2 / (2 if self.causal else 1)
        if self.what == "plan":
            pairs *= self.share()
        return 4.0 * pairs * self.head_dim * (3.5 if self.what == "backward" else 1.0)

    def share(self) -> float:
        """The pairs that the star plan attends to, as a share of causal attention's."""
        parts = rectangles_of(star_options(self.length, None).plan_of(self.length), 0)
        pairs = sum(
            sum(
                min(part.key_end, row + 1) - min(part.key_begin, row + 1) for row in range(part.row_begin, part.row_end)
            )
            if part.position_masked
            else (part.row_end - part.row_begin) * (part.key_end - part.key_begin)
            for part in parts
        )
        return pairs / (self.length * (self.length + 1) / 2)


def star_options(length: int, kernel: str | None) -> StarOptions:
    """The plan that is timed: blocks of an eighth of the prompt, with an anchor of a quarter of a block."""
    block = max(1, length // 8)
    return StarOptions(block_size=block, anchor_size=block // 4, query_size=min(256, block), kernel=kernel)


def cases(lengths: list[int], head_dims: list[int]) -> list[Case]:
    """The timed cases, the most important ones first: a time limit skips the last ones."""
    large = list(reversed(head_dims))
    timed = [Case("forward", n, d, True) for d in large for n in lengths]
    timed += [Case("plan", n, d, True) for d in large[:1] for n in lengths if n >= 32768 or n == max(lengths)]
    timed += [Case("decode", n, d, True) for d in large for n in lengths]
    timed += [Case("backward", n, d, True) for d in large for n in lengths]
    timed += [Case("forward", n, d, False) for d in large for n in lengths]
    middle = [case for case in timed if case.what == "plan" or 4096 <= case.length <= 32768]
    return middle + [case for case in timed if case not in middle]


def time_case(case: Case, device: torch.device, repeats: int) -> dict[str, Any]:
    """Median milliseconds by contender, and the error text of each contender that could not run.

    Returns:
        {"ms": {name: milliseconds}, "failed": {name: text}, "tflops": rate of `OURS` if it ran}; of plans also "share"
        of the pairs and "follows": the best contender's time over that share of dense attention's ("dense").
    """
    if case.what == "decode":
        heads, kv_heads = DECODE_HEADS
        shapes = [(1, heads, 1), (1, kv_heads, case.length), (1, kv_heads, case.length)]
    else:
        shapes = [(max(1, TOKENS // case.length), HIDDEN // case.head_dim, case.length)] * 3
    inputs = []
    for _ in range(3):
        given = [torch.randn(*shape, case.head_dim, device=device, dtype=torch.bfloat16) for shape in shapes]
        inputs.append([x.requires_grad_(case.what == "backward") for x in given])
    runs = star_contenders(case) if case.what == "plan" else contenders(case)
    if case.what == "backward":
        runs = {name: _with_backward(run) for name, run in runs.items()}
    ms, failed = medians_ms(runs, inputs, device, repeats)
    found: dict[str, Any] = {"ms": ms, "failed": failed}
    if OURS in ms:
        found["tflops"] = case.flops() / ms[OURS] / 1e9
    if case.what == "plan":
        found["share"] = case.share()
        plans = [time for name, time in ms.items() if name != "dense"]
        if "dense" in ms and plans:
            found["follows"] = min(plans) / (ms["dense"] * found["share"])
    return found


def _with_backward(run: Callable[..., Tensor]) -> Callable[..., Any]:
    def both(*inputs: Tensor) -> Any:
        out = run(*inputs)
        return torch.autograd.grad(out, inputs, out)

    return both


def contenders(case: Case) -> dict[str, Callable[..., Tensor]]:
    """What is chosen by default, our kernels, SDPA's back ends, compiled FlexAttention, and flash-attn if installed."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    causal = case.causal and case.what != "decode"  # the last row sees every key
    grouped = case.what == "decode"

    def sdpa(backend: SDPBackend) -> Callable[..., Tensor]:
        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=grouped)

        return run

    def ours(kernel: str | None) -> Callable[..., Tensor]:
        return lambda q, k, v: attend(q, k, v, is_causal=causal, kernel=kernel).out

    backends = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
    runs = {DEFAULT: ours(None), OURS: ours("triton"), **dict(zip(SDPA, map(sdpa, backends), strict=True))}
    runs[FLEX] = ours(FLEX)
    try:
        from flash_attn import flash_attn_func
    except ImportError:
        return runs
    runs["flash_attn"] = lambda q, k, v: flash_attn_func(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal
    ).transpose(1, 2)
    return runs


def star_contenders(case: Case) -> dict[str, Callable[..., Tensor]]:
    """A star plan by pieces through PyTorch's operators, and in one launch by FlexAttention and by our kernels; beside
    them what is chosen by default, and dense attention."""

    def star(kernel: str | None) -> Callable[..., Tensor]:
        options = star_options(case.length, kernel)

        def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            scale = query.shape[-1] ** -0.5
            mask = Mask(causal=True)
            return star_attention(
                query, key, value, mask, scale=scale, softcap=None, dropout=0.0, options=options
            ).out  # fmt: skip

        return run

    return {
        "dense": lambda q, k, v: attend(q, k, v, is_causal=True, kernel="aten").out,
        DEFAULT: star(None),
        "flash": star("aten"),
        FLEX: star(FLEX),
        OURS: star("triton"),
    }
