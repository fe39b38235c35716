"""A method's plan as one custom operator, so that compiled and exported graphs run what eager calls run.

A plan is made of lengths, and lengths are data: where prompts are padded or packed, or where a graph is made for any
length, tracing cannot know them. The operator hides the plan from the graph: inside, the method is called as in eager
mode. Its backward computes the forward again and differentiates it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.clean_thread import in_clean_thread
from hf_attn_plugins.core.decision import CallFacts
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial, lse_dtype
from hf_attn_plugins.hf.calls import recorder
from hf_attn_plugins.plugins import plugin

NO_BOUND = -1


def planned(
    name: str,
    stored: Mapping[str, Any],
    layer: int | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    tag: str,
    *,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> Partial:
    """The attention of plugin `name` with the options `stored` of a layer, as a node of a graph; see `kernels.attend`.

    Predicates, which no operator can carry, are written out as T x S booleans first.
    """
    bias, beside = mask.bias, None
    if mask.predicate is not None:
        seen = _written(mask.predicate, query, key, mask)
        if bias is None:
            bias = seen
        else:
            bias = bias & seen if bias.dtype == torch.bool else bias.masked_fill(~seen, -torch.inf)
    if mask.beside is not None:
        beside = _written(mask.beside, query, key, mask)
    offset = mask.offset if isinstance(mask.offset, Tensor) else None
    start = 0 if offset is not None else (key.shape[2] - query.shape[2] if mask.offset is None else mask.offset)
    left, right = (NO_BOUND if side is None else side for side in mask.window)
    seed = torch.randint(2**62, ()) if dropout else None
    out, lse = plan_forward(
        query, key, value, mask.key_padding, mask.query_segments, mask.key_segments, bias, beside, offset, seed,
        start, mask.causal, left, right, mask.prefix, scale, softcap or 0.0, dropout,
        name, _text(name, stored, layer), tag,
    )  # fmt: skip
    return Partial(out, lse)


@torch.compiler.assume_constant_result
def _text(name: str, stored: Mapping[str, Any], layer: int | None) -> str:
    """The options of a layer as JSON, for `_call`."""
    options = plugin(name).options_type().of(stored, f"hf_attn_plugins[{name!r}] in the config")
    return json.dumps(options.for_layer(layer).as_dict())


def _written(predicate: Callable[..., Tensor], query: Tensor, key: Tensor, mask: Mask) -> Tensor:
    rows, keys = (torch.arange(n, device=query.device) for n in (query.shape[2], key.shape[2]))
    start = key.shape[2] - query.shape[2] if mask.offset is None else mask.offset
    shape = (query.shape[0], 1, query.shape[2], key.shape[2])
    return Mask(predicate=predicate).visible(rows, keys, start, query.shape[0]).expand(shape)


def _call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    bias: Tensor | None,
    beside: Tensor | None,
    offset: Tensor | None,
    seed: Tensor | None,
    start: int,
    causal: bool,
    left: int,
    right: int,
    prefix: int,
    scale: float,
    softcap: float,
    dropout: float,
    name: str,
    options: str,
    tag: str,
) -> Partial:
    """The method's attention in eager mode, from the operator's arguments."""
    begin = start if offset is None else int(offset)
    if key_padding is not None and bool(key_padding.all()):
        key_padding = None
    mask = Mask(
        causal=causal,
        window=(None if left == NO_BOUND else left, None if right == NO_BOUND else right),
        offset=begin,
        prefix=prefix,
        key_padding=key_padding,
        query_segments=query_segments,
        key_segments=key_segments,
        bias=bias,
        beside=None if beside is None else lambda b, h, q, k: beside[b, 0, q - begin, k],
    )
    row = plugin(name)
    chosen = row.options_type().of(json.loads(options), f"hf_attn_plugins[{name!r}] in the config")
    if tag:
        number, layer, names = tag.split("|")
        facts = CallFacts(query.shape[2], key.shape[2], query.shape[0], begin, mask)
        made = row.decision()(facts, chosen).of_call(plugin=name)
        where = None if layer == "-1" else int(layer)
        recorder.add(int(number), made, facts, where, tuple(names.split("+")) if names else (), True)
    attend = row.attention()
    if seed is None:
        return attend(query, key, value, mask, scale=scale, softcap=softcap or None, dropout=0.0, options=chosen)
    with torch.random.fork_rng(devices=[query.device] if query.device.type == "cuda" else []):
        torch.manual_seed(int(seed))
        return attend(query, key, value, mask, scale=scale, softcap=softcap or None, dropout=dropout, options=chosen)


@torch.library.custom_op("hf_attn_plugins::plan_forward", mutates_args=())
def plan_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    bias: Tensor | None,
    beside: Tensor | None,
    offset: Tensor | None,
    seed: Tensor | None,
    start: int,
    causal: bool,
    left: int,
    right: int,
    prefix: int,
    scale: float,
    softcap: float,
    dropout: float,
    name: str,
    options: str,
    tag: str,
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, T, Dv) and lse (B, Hq, T) of a plugin's plan, contiguous; see `planned`."""
    out, lse = _call(
        query, key, value, key_padding, query_segments, key_segments, bias, beside, offset, seed, start, causal, left,
        right, prefix, scale, softcap, dropout, name, options, tag,
    )  # fmt: skip
    return out.contiguous(), lse.contiguous()


@plan_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    return out, query.new_empty(query.shape[:3], dtype=lse_dtype(query))


@torch.library.custom_op("hf_attn_plugins::plan_backward", mutates_args=())
def plan_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    bias: Tensor | None,
    beside: Tensor | None,
    offset: Tensor | None,
    seed: Tensor | None,
    start: int,
    causal: bool,
    left: int,
    right: int,
    prefix: int,
    scale: float,
    softcap: float,
    dropout: float,
    name: str,
    options: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, and of a float bias (empty where there is none)."""

    def differentiate() -> tuple[Tensor, ...]:
        leaves: list[Any] = [x.detach().requires_grad_() for x in (query, key, value)]
        learned = None if bias is None or not bias.is_floating_point() else bias.detach().requires_grad_()
        given = bias if learned is None else learned
        q, k, v = leaves
        part = _call(
            q, k, v, key_padding, query_segments, key_segments, given, beside, offset, seed, start, causal, left, right,
            prefix, scale, softcap, dropout, name, options, "",
        )  # fmt: skip
        asked = leaves if learned is None else [*leaves, learned]
        return torch.autograd.grad(tuple(part), asked, (grad_out, grad_lse), allow_unused=True)

    # Inside an operator the dispatcher records no gradients; a thread of its own starts with a clean state.
    grads = list(in_clean_thread(query.device, differentiate))
    given = [query, key, value, query.new_empty(0) if bias is None else bias]
    grads += [query.new_empty(0)] * (4 - len(grads))
    return tuple(torch.zeros_like(x) if g is None else g.contiguous() for g, x in zip(grads, given, strict=True))  # type: ignore[return-value]


@plan_backward.register_fake
def _(grad_out: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    bias = rest[3]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    learned = bias is not None and bias.is_floating_point()
    return (*grads, torch.empty_like(bias, memory_format=torch.contiguous_format) if learned else query.new_empty(0))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:10], *output)
    ctx.options = inputs[10:-1]


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    *inputs, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    *grads, grad_bias = plan_backward(grad_out, grad_lse, *inputs, *ctx.options)
    needs_bias = ctx.needs_input_grad[6]
    return (*grads, None, None, None, grad_bias if needs_bias else None, None, None, None, *[None] * 11)


plan_forward.register_autograd(_backward, setup_context=_setup)
