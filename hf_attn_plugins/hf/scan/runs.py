"""What is run of a model and compared: its outputs, with padding, generation through a cache, gradients, a graph."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.hf.calls.call_arguments import seen_by
from hf_attn_plugins.hf.compat import registered_attention
from hf_attn_plugins.hf.scan.tiny.inputs import Inputs

Values = dict[str, Tensor]
NEW_TOKENS = 4


def tensors(output: Any, name: str = "", depth: int = 0) -> Values:
    """The floating-point tensors in an output, by name; caches and attention weights are left out."""
    if isinstance(output, Tensor):
        return {name or "output": output} if output.is_floating_point() and output.numel() else {}
    if output is None or depth > 4 or "past_key_values" in name or "attentions" in name or name.endswith("cache"):
        return {}
    if isinstance(output, Mapping):
        items = [(str(key), value) for key, value in output.items()]
    elif isinstance(output, (list, tuple)):
        items = [(str(index), value) for index, value in enumerate(output)]
    else:
        return {}
    found: Values = {}
    for key, value in items:
        found.update(tensors(value, f"{name}.{key}" if name else key, depth + 1))
    return found


def forward(model: Any, arguments: Mapping[str, Any]) -> Values:
    """Outputs of one call without gradients."""
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(model(**arguments))


def padded(model: Any, inputs: Inputs) -> Values:
    """Outputs of the call with padding, at the positions that are visible."""
    assert inputs.padded is not None and inputs.visible is not None
    found = forward(model, inputs.padded)
    seen = inputs.visible.bool()
    kept: Values = {}
    for name, value in found.items():
        if value.ndim >= 3 and value.shape[:2] == seen.shape:
            kept[name] = value[seen]
        elif value.ndim >= 3 and value.shape[0] == seen.shape[0] and inputs.side == "right":
            kept[name] = value[:, : max(1, value.shape[1] // 2)]  # a subsampled sequence, or the decoder's own
    return kept


def generate(model: Any, arguments: Mapping[str, Any]) -> Values:
    """Logits of greedy generation, step by step, and the tokens chosen."""
    torch.manual_seed(0)
    config = model.generation_config
    before = config.eos_token_id
    config.eos_token_id = None
    try:
        with torch.no_grad():
            output = model.generate(
                **arguments, max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1, return_dict_in_generate=True,
                output_logits=True,
            )  # fmt: skip
    finally:
        config.eos_token_id = before
    steps = output.logits or ()
    return {f"step {i}": step for i, step in enumerate(steps)}


def gradient(model: Any, arguments: Mapping[str, Any]) -> Values:
    """Gradients of every weight of a fixed random combination of the outputs."""
    torch.manual_seed(0)
    model.zero_grad(set_to_none=True)
    generator = torch.Generator().manual_seed(3)
    loss: Any = 0.0
    for value in tensors(model(**arguments)).values():
        if value.requires_grad and torch.isfinite(value).all():
            loss = loss + (value * torch.randn(value.shape, generator=generator).to(value.dtype)).mean()
    if not isinstance(loss, Tensor):
        raise ValueError("no output depends on a weight")
    loss.backward()
    found = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def compiled(model: Any, arguments: Mapping[str, Any]) -> Values:
    """Outputs of one call of the graph that torch.compile traces."""
    torch.compiler.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(torch.compile(model, backend="eager")(**arguments))


@dataclass(frozen=True)
class Difference:
    """The largest deviation over its tensor's own scale: `relative`, found in tensor `where`."""

    relative: float
    where: str


def difference(base: Values, other: Values) -> Difference:
    """Compare two sets of outputs; generation is compared up to the step after which its tokens differ."""
    worst = Difference(0.0, "")
    # A tensor that is zero but for rounding, as the gradient of a key's bias is, has no scale of its own.
    floor = 1e-3 * max((_scale(value) for value in base.values()), default=0.0)
    for name, value in base.items():
        if name not in other or other[name].shape != value.shape:
            return Difference(float("inf"), f"{name}: {tuple(value.shape)}, {_shape(other.get(name))}")
        mine = other[name].double()
        value = value.double()
        finite = torch.isfinite(value)
        if not torch.equal(finite, torch.isfinite(mine)):
            return Difference(float("inf"), f"{name}: not finite in other places")
        off = float((value - mine)[finite].abs().max()) if finite.any() else 0.0
        relative = off / max(_scale(value), floor, 1e-9)
        if relative > worst.relative:
            worst = Difference(relative, name)
        if name.startswith("step ") and not torch.equal(value.argmax(-1), mine.argmax(-1)):
            break
    return worst


def _scale(value: Tensor) -> float:
    finite = torch.isfinite(value)
    return float(value[finite].abs().max()) if finite.any() else 0.0


def _shape(value: Tensor | None) -> str:
    return "missing" if value is None else str(tuple(value.shape))


@contextlib.contextmanager
def counted(name: str) -> Iterator[list[dict[str, Any]]]:
    """Record the calls that reach the attention function registered as `name`: rows, keys and what its mask says."""
    from transformers import AttentionInterface

    calls: list[dict[str, Any]] = []
    function: Any = registered_attention(name)

    def recorded(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **rest: Any
    ) -> Any:
        seen = seen_by(module, query, key, attention_mask, rest.get("is_causal"), rest.get("sliding_window"))
        mask, causal = seen.mask, seen.is_causal
        plain = mask.causal and mask.window == (None, None) and mask.has_no_tensors()
        calls.append(
            {
                "module": type(module).__name__,
                "rows": query.shape[2],
                "keys": key.shape[2],
                "causal": bool(causal) and query.shape[2] > 1,
                "plain": bool(plain),
                "recognised": bool(seen.recognised),
            }
        )
        return function(module, query, key, value, attention_mask, **rest)

    AttentionInterface.register(name, recorded)
    try:
        yield calls
    finally:
        AttentionInterface.register(name, function)
