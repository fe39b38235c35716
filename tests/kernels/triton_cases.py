"""What the Triton tests share: inputs, masks, and the comparison with the float64 oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.kernels.triton.support import INSTALLED, interpreting
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention, sharp_inputs, visibility

LOG2_E = math.log2(math.e)

needs_interpreter = pytest.mark.skipif(
    not INSTALLED or not interpreting(),
    reason="Triton is not installed" if not INSTALLED else "a GPU is here (see -m gpu), so the interpreter is off",
)


def padding(batch: int, keys: int) -> Tensor:
    """Left-padded, right-padded, holed, and for the last row no key at all."""
    real = torch.ones(batch, keys, dtype=torch.bool)
    real[0, : keys // 3] = False
    if batch > 2:
        real[1, keys - keys // 4 :] = False
        real[-1] = False
    if batch > 3:
        real[2, 1::3] = False
    return real


def segments(batch: int, length: int, parts: int = 3) -> Tensor:
    """Packed sequences, cut at other places in every row of the batch."""
    index = torch.arange(length)
    return torch.stack([(index * parts + 2 * b).div(max(length, 1), rounding_mode="floor") for b in range(batch)])


def oracle(query: Tensor, key: Tensor, value: Tensor, fields: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor]:
    """`dense_attention` under the mask that `fields` describe, in the dtype of the inputs."""
    fields = dict(fields)
    bias, seen = fields.pop("bias", None), torch.ones((), dtype=torch.bool)
    if bias is not None and bias.dtype == torch.bool:
        bias, seen = None, bias
    visible = visibility(query.shape[2], key.shape[2], **fields) & seen
    return dense_attention(query, key, value, visible, bias=bias, **options)


def base_two(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    fields: dict[str, Any],
    grads: list[Tensor],
    reordered: bool,
    **options: Any,
) -> list[Tensor]:
    """The kernels' mathematics done the plain way in float32: base-2 scores, P again from the lse, dS = P (dP - delta).

    It has the roundings that any kernel of this form has and autograd through a softmax does not. `reordered` scales
    the query instead of the scores and adds up in the other order: another draw of the same roundings.
    """
    query, key, value = (x.detach() for x in (query, key, value))
    groups, scale = query.shape[1] // key.shape[1], options.get("scale") or query.shape[-1] ** -0.5
    if options.get("scale") == 0.0:
        scale = 0.0
    keys, values = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    zeros, ones = torch.zeros_like(query[..., :1]), torch.ones_like(keys[..., :1])
    # The oracle's mask as a matrix: what a row of zeros makes of keys of ones, with one value column a key.
    columns = torch.eye(key.shape[2], dtype=query.dtype).expand(*keys.shape[:2], -1, -1)
    plain = {name: field for name, field in fields.items() if name != "bias" or field.dtype == torch.bool}
    seen = oracle(zeros, ones, columns, plain)[0] > 0
    raw = query @ keys.mT if not reordered else (query.flip(-1) * scale) @ keys.flip(-1).mT
    factor = 1.0 if reordered else scale
    softcap, bias = options.get("softcap"), fields.get("bias")
    bent = None if softcap is None else torch.tanh(raw * (factor / softcap))
    scores = raw * (factor * LOG2_E) if bent is None else bent * (softcap * LOG2_E)
    if bias is not None and bias.dtype != torch.bool:
        scores = scores + bias * LOG2_E
    scores = scores.masked_fill(~seen, -torch.inf)
    top = scores.amax(-1, keepdim=True).clamp_min(-1e38) if key.shape[2] else zeros
    total = (scores - top).exp2().sum(-1, keepdim=True)
    some = total > 0
    out = (scores - top).exp2() @ values / total.masked_fill(~some, 1)
    lse2 = torch.where(some, top + total.log2(), torch.inf)
    weights = (scores - lse2).exp2()
    delta = (grads[0] * out).sum(-1, keepdim=True) - grads[1].unsqueeze(-1)
    d_scores = weights * (grads[0] @ values.mT - delta)
    if bent is not None:
        d_scores = d_scores * (1 - bent * bent)
    if reordered:
        keys, query, d_scores = keys.flip(2), query.flip(2), d_scores.flip(2, 3)
        weights, grads = weights.flip(2), [grads[0].flip(2)]
    d_query, d_key, d_value = d_scores @ keys * scale, d_scores.mT @ query * scale, weights.mT @ grads[0]
    if reordered:
        d_query, d_key = d_query.flip(2), d_key.flip(2)
    lse = torch.where(some, lse2 / LOG2_E, 0)[..., 0]
    return [out, lse, some, d_query, *(x.unflatten(1, (-1, groups)).sum(2) for x in (d_key, d_value))]


def check(
    inputs: tuple[Tensor, Tensor, Tensor],
    fields: dict[str, Any],
    *,
    run: Callable[..., Partial] | None = None,
    gradients: bool = True,
    tensor_offset: bool = False,
    **options: Any,
) -> None:
    """Assert the error rule for out, lse and the three gradients, with gradients flowing into both out and lse.

    Low precision done the plain way is the oracle in the inputs' dtype; in float32 also `base_two`, the worse counts.
    """
    made = dict(fields)
    made["causal"] = made.pop("is_causal", False)
    if tensor_offset:
        made["offset"] = torch.tensor(made.get("offset", inputs[1].shape[2] - inputs[0].shape[2]))
    mask = Mask(**made)
    run = run or (lambda q, k, v: attend(q, k, v, mask=mask, kernel="triton", **options))
    generator = torch.Generator().manual_seed(1)
    outputs: dict[str, list[Tensor]] = {}
    weights: list[Tensor] = []
    for name, dtype in (("ref", torch.float64), ("low", inputs[0].dtype), ("ours", inputs[0].dtype)):
        leaves = [x.detach().to(dtype).requires_grad_(gradients) for x in inputs]
        out, lse = run(*leaves) if name == "ours" else oracle(*leaves, fields, **options)
        if not weights:
            weights = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, lse)]
        finite = lse > -torch.inf
        outputs[name] = [out.detach(), torch.where(finite, lse, 0).detach(), finite]
        if gradients:
            loss = (out * weights[0].to(dtype)).sum() + (torch.where(finite, lse, 0) * weights[1].to(lse.dtype)).sum()
            outputs[name] += torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    assert outputs["ours"][1].dtype == torch.float32
    assert torch.equal(outputs["ours"][2], outputs["ref"][2]), "rows without keys differ"
    lows = [outputs["low"]]
    if inputs[0].dtype == torch.float32 and inputs[1].shape[2]:
        finite = outputs["ref"][2]
        grads = [weights[0].float(), torch.where(finite, weights[1], 0).float()]
        lows += [base_two(*inputs, fields, grads, reordered, **options) for reordered in (False, True)]
    names = ["out", "lse", "finite", "d_query", "d_key", "d_value"]
    for index, (name, ours, ref) in enumerate(zip(names, outputs["ours"], outputs["ref"], strict=False)):
        if name != "finite":
            factor = 3.0 if name.startswith("d_") or "softcap" in options else 2.0
            worst = max(
                (low[index] for low in lows), key=lambda low: float((low - ref).abs().max()) if ref.numel() else 0
            )
            assert_close_to_reference(ours, worst, ref, factor, name)


def draw(
    batch: int, rows: int, keys: int, *, heads: tuple[int, int] = (2, 1), dims: tuple[int, int] = (16, 16), **more: Any
):
    """`sharp_inputs` with GQA by default."""
    return sharp_inputs(batch, *heads, rows, keys, *dims, **more)


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels launched from here on, in a list that grows."""
    from hf_attn_plugins.kernels.triton import launch as triton_launch

    names: list[str] = []
    plain = triton_launch.launch

    def noting(kernel: Any, grid: tuple[int, ...], *arguments: Any, **keywords: Any) -> None:
        names.append(kernel.__name__)
        plain(kernel, grid, *arguments, **keywords)

    monkeypatch.setattr(triton_launch, "launch", noting)
    return names


ONE_LAUNCH_EACH = ["forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel"]  # forward, then backward
