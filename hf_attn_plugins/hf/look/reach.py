"""How far every key head of a model looks in one text, and how much of that a plan of star hides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.options import OfLayer
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.hf.configure import use
from hf_attn_plugins.hf.register import registered
from hf_attn_plugins.hf.tuning.heads import sampled
from hf_attn_plugins.plugins import Plugin, plugin
from hf_attn_plugins.star.options import StarOptions

WINDOWS = (64, 256, 1024, 4096)  # tokens; each holds the token itself
FIRST = 64  # tokens that count as first ones
ROWS, CHUNK = 256, 32  # rows that are looked at, evenly spread over the text, and how many of them at a time


@dataclass(frozen=True)
class HeadReach:
    """Where the attention of one key head goes: shares of the weight, means over rows and over its queries.

    Attributes:
        layer, head: of the model, and of the layer's key heads.
        within: the share on the last `WINDOWS` tokens, the row's own one included.
        first: the share on the first `FIRST` tokens.
        hidden: the share on tokens that the plan hides, were the head to follow it.
        dense: whether the options let this head see everything.
    """

    layer: int
    head: int
    within: tuple[float, ...]
    first: float
    hidden: float
    dense: bool


class _Probe:
    """Dense attention that looks at some rows' weights on the way."""

    def __init__(self, options: StarOptions) -> None:
        self.dense, self.options = plugin("tiled_attention"), options
        self.found: dict[int, list[HeadReach]] = {}

    def plugin(self) -> Plugin:
        return Plugin(
            name="look_probe",
            summary="dense attention that looks at its weights",
            exact=True,
            source="softmax attention by its definition, arXiv 1706.03762, section 3.2.1",
            entry=self.attention,
            options=OfLayer,
        )

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Mask, *, options: OfLayer, **numbers: Any
    ) -> Partial:
        exact = self.dense.attention()(query, key, value, mask, options=self.dense.options_type()(), **numbers)
        layer = options.layer
        if layer is not None and query.shape[2] > 1 and mask.causal:
            dense = self.options.for_layer(layer).layer_heads
            shares = self._shares(query, key, mask, numbers["scale"], numbers["softcap"])
            self.found[layer] = [
                HeadReach(layer, head, tuple(row[:-2]), row[-2], row[-1], head in dense)
                for head, row in enumerate(shares.tolist())
            ]
        return exact

    def _shares(self, query: Tensor, key: Tensor, mask: Mask, scale: float, softcap: float | None) -> Tensor:
        """(Hkv, windows + 2): the shares within each window, on the first tokens, and on hidden ones."""
        rows, keys = query.shape[2], torch.arange(key.shape[2], device=key.device)
        start, plan = mask.start(rows, key.shape[2]), self.options.plan_of(rows)
        index = sampled(rows, ROWS).to(query.device)
        total = torch.zeros(key.shape[1], len(WINDOWS) + 2, dtype=torch.float64, device=query.device)
        for part in index.split(CHUNK):
            asked = query[:, :, part].unflatten(1, (key.shape[1], -1)).float()
            scores = asked @ key.float().unsqueeze(2).transpose(-1, -2) * scale
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            scores = scores.flatten(1, 2)
            if mask.bias is not None and mask.bias.is_floating_point():
                scores = scores + mask.bias_tile(part, keys)
            scores = scores.masked_fill(~mask.visible(part, keys, start, len(query)), -torch.inf)
            weights = scores.softmax(-1).nan_to_num(0.0).unflatten(1, (key.shape[1], -1)).mean((0, 2))
            position = (part + start).unsqueeze(-1)
            block = position // plan.block_size * plan.block_size
            seen = (keys < plan.anchor_size) | (keys >= block - plan.halo_size) | (position >= plan.context)
            masks = [keys > position - window for window in WINDOWS]
            masks += [(keys < FIRST).expand(len(part), -1), ~seen]
            total += torch.stack([(weights * chosen).sum((-1, -2)) for chosen in masks], -1).double()
        return (total / len(index)).cpu()


def reach(model: nn.Module, run: Callable[[], object], options: StarOptions) -> list[HeadReach]:
    """The reach of every key head, from the one forward that `run()` makes with dense attention.

    Args:
        model: a causal model of Transformers.
        run: prefills one unpadded text.
        options: of `star_attention`; what its plan hides is measured.

    Raises:
        ValueError: no attention layer could be looked at: the model's modules do not say which layer they are.
    """
    probe = _Probe(options)
    with registered(probe.plugin()), use(model, "look_probe"):
        run()
    if not probe.found:
        raise ValueError(
            f"no key head of {type(model).__name__} could be looked at: its attention modules have no layer_idx."
        )
    return [head for layer in sorted(probe.found) for head in probe.found[layer]]
