"""What a choice of options costs and saves on given texts: KL, share of the pairs, seconds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hf_attn_plugins.bench.timing import synchronize
from hf_attn_plugins.hf.configure import configure, use
from hf_attn_plugins.hf.predictions import CHUNK, backbone, divergence, log_probabilities, logits_of
from hf_attn_plugins.hf.trace import trace
from hf_attn_plugins.hf.tuning.heads import sampled
from hf_attn_plugins.star.options import StarOptions

TUNED = tuple(name for name in StarOptions.names() if name != "kernel")  # a kernel that a user named stays
POSITIONS = 1024  # of a text at which predictions are compared, evenly spread over all of it


@dataclass(frozen=True)
class Point:
    """One choice of options, measured.

    Attributes:
        options: those of the plugin.
        share: attended over causal pairs, mean over layers and heads.
        kl: mean KL(dense || this) in nats of each text, over positions of the whole text.
    """

    options: dict[str, Any]
    share: float
    kl: tuple[float, ...]

    @property
    def mean_kl(self) -> float:
        """Mean over the texts."""
        return statistics.fmean(self.kl)


class Measuring:
    """Texts and a model's own predictions for them; `point` measures options against these.

    The model must have been set to the plugin; its options are changed as points are measured.
    """

    def __init__(self, model: nn.Module, name: str, baseline: str, texts: Sequence[Tensor]) -> None:
        self.model, self.name, self.baseline, self.texts = model, name, baseline, list(texts)
        self.base = backbone(model)
        self.index = sampled(self.texts[0].shape[1], POSITIONS)
        self.wanted: list[Tensor] = []

    def run(self, text: int = 0) -> Any:
        """The last hidden states of a text, and the seconds they took."""
        ids = self.texts[text]
        start = time.perf_counter()
        output = self.base(ids, use_cache=False)
        synchronize(ids.device)
        return output, time.perf_counter() - start

    def begin(self) -> None:
        """Prefill every text with the baseline and keep the hidden states at the compared positions."""
        with use(self.model, self.baseline):
            self.base(self.texts[0][:, :256], use_cache=False)  # lazy set-up is not attention's cost
            for text in range(len(self.texts)):
                output, _ = self.run(text)
                self.wanted.append(output.last_hidden_state[:, self.index].clone())

    def set(self, options: Mapping[str, Any]) -> None:
        """Store options in the model; those of `TUNED` that are not given become their defaults."""
        configure(self.model, self.name, **{**dict.fromkeys(TUNED), **options})

    def point(self, options: Mapping[str, Any], texts: Sequence[int] = (0,)) -> Point:
        """Measure options on some of the texts."""
        self.set(options)
        kl, share = [], 1.0
        for text in texts:
            with trace(self.model) as seen:
                output, _ = self.run(text)
            share = seen.share if seen.share is not None else 1.0
            kl.append(self._kl(text, output))
        return Point(dict(options), share, tuple(kl))

    def _kl(self, text: int, output: Any) -> float:
        total = 0.0
        for part, states in zip(self.index.split(CHUNK), self.wanted[text].split(CHUNK, 1), strict=True):
            ids = self.texts[text][:, part]
            wanted = logits_of(self.model, ids, output, states)
            got = logits_of(self.model, ids, output, output.last_hidden_state[:, part])
            total += float(divergence(log_probabilities(wanted), log_probabilities(got)).sum())
        return total / (len(self.index) * self.texts[text].shape[0])

    def interleaved(self, options: Mapping[str, Any], rounds: int) -> list[float]:
        """Seconds of the baseline over seconds with `options`, one ratio a round: both run in every round."""
        ratios = []
        self.set(options)
        for _ in range(rounds):
            _, sparse = self.run()
            with use(self.model, self.baseline):
                _, dense = self.run()
            ratios.append(dense / sparse)
        return ratios
