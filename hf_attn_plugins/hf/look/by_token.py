"""Where in a text predictions change under a plugin: KL token by token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.hf.configure import use
from hf_attn_plugins.hf.predictions import CHUNK, backbone, divergence, log_probabilities_at
from hf_attn_plugins.hf.trace import trace


@dataclass(frozen=True)
class Changes:
    """What an attention changes in the predictions for one text.

    Attributes:
        kl: (T,) nats between the two predictions *for* each token, from the tokens before it; 0 for the first token.
        first: (T,) ids of the baseline's first choices, and `other` this attention's; -1 for the first token.
        plan: what ran, in the words of `hap.trace`.
        share: attended over causal pairs, or None where nothing was counted.
    """

    kl: Tensor
    first: Tensor
    other: Tensor
    plan: str
    share: float | None

    @property
    def changed(self) -> Tensor:
        """(T,) bool: tokens whose first choice is another one."""
        return self.first != self.other

    def choices(self) -> set[int]:
        """Token ids that either run would choose where the two differ."""
        return {*self.first[self.changed].tolist(), *self.other[self.changed].tolist()}


def changes(
    model: Any,
    ids: Tensor,
    baseline: str,
    attentions: list[tuple[str, str, dict[str, Any]]],
    progress: Callable[[str], None] = lambda what: None,
) -> dict[str, Changes]:
    """The changes under each attention against a baseline.

    Args:
        model: a causal model of Transformers.
        ids: (1, T) token ids, at least two.
        baseline: an attention implementation.
        attentions: (label, implementation, options) of each.
        progress: called with what runs next.
    """
    base = backbone(model)
    runs, traces = [], []
    with torch.inference_mode():
        for label, name, options in [(baseline, baseline, {}), *attentions]:
            progress(label)
            with use(model, name, **options), trace(model) as seen:
                runs.append(base(ids, use_cache=False))
            traces.append(seen)
        length = ids.shape[1]
        first, chosen, kl = [], [[] for _ in attentions], [[] for _ in attentions]  # type: ignore[var-annotated]
        for places in torch.arange(length - 1).split(CHUNK):
            wanted = log_probabilities_at(model, ids, runs[0], places)
            first.append(wanted.argmax(-1))
            for index, run in enumerate(runs[1:]):
                found = log_probabilities_at(model, ids, run, places)
                chosen[index].append(found.argmax(-1))
                kl[index].append(divergence(wanted, found))
    nothing = torch.tensor([-1])
    before = torch.cat([nothing, *(each.cpu() for each in first)])
    return {
        label: Changes(
            torch.cat([torch.zeros(1, dtype=torch.float64), *(each.cpu() for each in kl[index])]),
            before,
            torch.cat([nothing, *(each.cpu() for each in chosen[index])]),
            seen.plan(),
            seen.share,
        )
        for index, ((label, _, _), seen) in enumerate(zip(attentions, traces[1:], strict=True))
    }
