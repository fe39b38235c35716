"""Which key heads of a model lose most when they follow a plan: an order of heads from one forward.

The measure of a head: how far its output moves, through its columns of the output projection, as a share of the
residual stream. It is taken where the hidden states are still those of dense attention, so no head is blamed for
what heads before it lost. The same question asked exactly costs a forward for every head: `exact_losses`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.options import OfLayer, Options
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.hf.configure import use
from hf_attn_plugins.hf.models.attention_modules import attention_modules
from hf_attn_plugins.hf.register import registered
from hf_attn_plugins.plugins import Plugin, plugin

SAMPLED = 512  # positions at which heads are measured, evenly spread over the prompt
Losses = dict[int, list[float]]  # for every layer one number per key head


class Probe:
    """Dense attention that notes, layer by layer, what each key head would lose by a plugin's plan."""

    def __init__(self, name: str, options: Options) -> None:
        self.dense, self.sparse = plugin("tiled_attention"), plugin(name)
        self.options = options
        self.losses: Losses = {}
        self.kv_heads: dict[int, int] = {}
        self.lost: Tensor | None = None  # (B, Hq, sampled, Dv) of the layer that runs now
        self.layer, self.residual = -1, None
        self._inside = False

    def plugin(self) -> Plugin:
        """A row that computes dense attention and notes on the way."""
        return Plugin(
            name="tuning_probe",
            summary="dense attention that measures heads",
            exact=True,
            source="DuoAttention, arXiv 2410.10819, for the question; the measure is this package's own",
            entry=self.attention,
            options=OfLayer,
        )

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, *, options: OfLayer, **numbers: Any
    ) -> Partial:
        """The dense result; `lost` is what the plan's result differs by."""
        exact = self.dense.attention()(query, key, value, mask, options=self.dense.options_type()(), **numbers)
        if options.layer is None or query.shape[2] < 2 or self._inside:
            return exact
        other = self.sparse.attention()(query, key, value, mask, options=self.options, **numbers)
        index = sampled(query.shape[2], SAMPLED)
        self.lost = exact.out[:, :, index].float() - other.out[:, :, index].float()
        self.layer, self.kv_heads[options.layer] = options.layer, key.shape[1]
        return exact

    def note_residual(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a layer: the residual stream that enters it."""
        stream = args[0] if args else kwargs.get("hidden_states")
        self.residual = None
        if isinstance(stream, Tensor) and stream.ndim == 3:
            self.residual = stream[:, sampled(stream.shape[1], SAMPLED)].float().norm(dim=-1)

    def note_projection(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Before a projection: if it is the one that follows the attention, what each key head's loss becomes by it."""
        lost = self.lost
        if self._inside or lost is None or not args or not isinstance(args[0], Tensor):
            return
        batch, heads, rows, dim = lost.shape
        if args[0].shape[-1] != heads * dim:
            return
        self.lost, self._inside = None, True
        try:
            kv_heads = self.kv_heads[self.layer]
            nothing = lost.new_zeros(batch, rows, heads, dim)
            with torch.no_grad():
                zero = module(nothing.flatten(2).to(args[0].dtype)).float()
                self.losses[self.layer] = [
                    self._loss(module, lost, nothing, zero, group, args[0].dtype)
                    for group in torch.arange(heads).view(kv_heads, -1)
                ]
        finally:
            self._inside = False

    def _loss(
        self, module: nn.Module, lost: Tensor, nothing: Tensor, zero: Tensor, group: Tensor, dtype: torch.dtype
    ) -> float:
        alone = nothing.clone()
        alone[:, :, group] = lost.transpose(1, 2)[:, :, group]
        moved = (module(alone.flatten(2).to(dtype)).float() - zero).norm(dim=-1)
        stream = 1.0 if self.residual is None else self.residual.clamp_min(1e-12)
        return float((moved / stream).square().mean())


def sampled(length: int, count: int) -> Tensor:
    """Up to `count` positions, evenly spread over 0 .. length - 1."""
    return torch.arange(length) if length <= count else torch.arange(count) * length // count + length // count // 2


def losses(model: nn.Module, run: Callable[[], object], name: str, options: Options) -> Losses:
    """What every key head would lose by the plan of `options`, from the one forward that `run()` makes.

    Raises:
        ValueError: no attention layer could be measured: the model's modules do not say which layer they are, or no
            projection follows their attention.
    """
    probe = Probe(name, options)
    with registered(probe.plugin()), use(model, "tuning_probe"), _hooked(model, probe):
        run()
    if not probe.losses:
        raise ValueError(
            f"no key head of {type(model).__name__} could be measured: its attention modules have no layer_idx, or no "
            "projection follows them. Tune with dense heads left out: heads=False."
        )
    return probe.losses


@contextlib.contextmanager
def _hooked(model: nn.Module, probe: Probe) -> Iterator[None]:
    parents = {child: parent for parent in model.modules() for child in parent.children()}
    with contextlib.ExitStack() as stack:
        for attention in attention_modules(model):
            layer = parents.get(attention)
            if layer is not None:
                stack.callback(layer.register_forward_pre_hook(probe.note_residual, with_kwargs=True).remove)
            for module in attention.modules():
                if module is not attention and getattr(module, "weight", None) is not None:
                    stack.callback(module.register_forward_pre_hook(probe.note_projection).remove)
        yield


def order_of(found: Losses) -> list[tuple[int, int]]:
    """(layer, key head), the one that loses most first."""
    heads = [(loss, layer, head) for layer, row in found.items() for head, loss in enumerate(row)]
    return [(layer, head) for _, layer, head in sorted(heads, key=lambda each: (-each[0], each[1], each[2]))]


def listed(heads: list[tuple[int, int]]) -> list[list[int]] | None:
    """(layer, key head) pairs as the option `dense_heads`."""
    if not heads:
        return None
    rows: list[list[int]] = [[] for _ in range(max(layer for layer, _ in heads) + 1)]
    for layer, head in heads:
        rows[layer].append(head)
    return [sorted(row) for row in rows]


def exact_losses(found: Losses, kl_of: Callable[[list[list[int]] | None], float]) -> Losses:
    """The same by the definition: the KL when one key head alone follows the plan, a forward a head.

    Args:
        found: what `losses` gave: layers and numbers of heads are read from it.
        kl_of: the mean KL under a list of dense heads.
    """
    everyone = [(layer, head) for layer, row in found.items() for head in range(len(row))]
    return {
        layer: [kl_of(listed([each for each in everyone if each != (layer, head)])) for head in range(len(row))]
        for layer, row in found.items()
    }


def rank_correlation(one: Losses, other: Losses) -> float:
    """Spearman's correlation of two orders of the same heads."""
    flat = [torch.tensor([loss for layer in sorted(each) for loss in each[layer]]) for each in (one, other)]
    ranks = torch.stack([values.argsort().argsort().double() for values in flat])
    return float(torch.corrcoef(ranks)[0, 1])
