"""`compare`: how far a plugin's predictions are from another backend's on the same tokens, and at what cost."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.bench.peak_memory import PeakMemory
from hf_attn_plugins.bench.timing import synchronize
from hf_attn_plugins.hf import predictions
from hf_attn_plugins.hf.configure import use
from hf_attn_plugins.hf.models.evaluating import evaluating
from hf_attn_plugins.hf.models.families import own_backend
from hf_attn_plugins.hf.models.unwrap import language_model
from hf_attn_plugins.hf.trace import trace
from hf_attn_plugins.plugins import PLUGINS


@dataclass(frozen=True)
class Run:
    """One backend's side: median seconds of a prefill, tokens/s, peak memory in bytes above the start, perplexity.

    `repeats` holds the seconds of every timed prefill, in the order in which they ran; `plan` says what a plugin's
    attention really did (`trace`), None for another backend.
    """

    name: str
    options: dict[str, Any]
    seconds: float
    tokens_per_second: float
    peak_bytes: int | None
    perplexity: float
    repeats: tuple[float, ...] = ()
    plan: str | None = None


@dataclass(frozen=True)
class Agreement:
    """Agreement of next-token distributions over all positions of a text.

    Attributes:
        kl_*: KL(baseline || plugin) in nats per position: mean, median, 99.9th percentile, maximum.
        top1: share of positions where both predict the same token.
        max_probability_difference, rms_probability_difference: over all positions and tokens.
        perplexity_ratio: plugin's perplexity over the baseline's, on the same tokens.
        speedup: baseline's seconds over the plugin's.
        within_noise: the two ranges of seconds (min - max over repeats) overlap, or there was one repeat only.
    """

    tokens: int
    kl_mean: float
    kl_median: float
    kl_p999: float
    kl_max: float
    top1: float
    max_probability_difference: float
    rms_probability_difference: float
    perplexity_ratio: float
    speedup: float
    within_noise: bool
    baseline: Run
    plugin: Run

    def as_dict(self) -> dict[str, Any]:
        """Everything as JSON-ready values."""
        return dataclasses.asdict(self)


def compare(
    model: nn.Module,
    input_ids: Tensor,
    name: str,
    *,
    baseline: str | None = None,
    attention_mask: Tensor | None = None,
    repeats: int = 2,
    progress: Callable[[str, int, int], None] | None = None,
    **options: Any,
) -> Agreement:
    """Prefill the same tokens with two attention backends and compare their predictions at every position.

    Only hidden states of whole runs are kept; logits are formed in chunks of positions, for both backends at once.

    Args:
        model: a causal language model; wrappers such as DistributedDataParallel are looked through.
        input_ids: (B, T) token ids with T >= 2, on the model's device.
        name, options: the plugin under test and its options.
        baseline: the implementation to compare with; None: the model's own default, sdpa where its class supports it,
            else eager.
        attention_mask: (B, T), 1 for real tokens; padded positions are left out of every figure.
        repeats: timed prefills of each backend, interleaved; the median counts.
        progress: called with (what, done, total).

    Returns:
        `Agreement`.

    Raises:
        ValueError: fewer than two tokens, an unknown plugin or option, or a model the plugin cannot be used with.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must be (batch, tokens) with at least 2 tokens, got {tuple(input_ids.shape)}.")
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: at least 1 is needed.")
    progress, model = progress or (lambda *_: None), language_model(model)
    baseline, base = baseline or own_backend(model), predictions.backbone(model)
    sides = [(baseline, {}), (name, options)]
    seconds: list[list[float]] = [[], []]
    peaks: list[int | None] = [None, None]
    hidden: list[Any] = [None, None]
    plans: list[str | None] = [None, None]
    with torch.inference_mode(), evaluating(model):
        for side, chosen in sides:  # one short run each: lazy set-up is not attention's cost
            with use(model, side, **chosen):
                base(input_ids[:, : min(256, input_ids.shape[1])], use_cache=False)
        for repeat in range(repeats):
            for which, (side, chosen) in enumerate(sides):
                progress(f"prefill with {side}", 2 * repeat + which, 2 * repeats)
                hidden[which] = None
                with use(model, side, **chosen), trace(model) as seen, PeakMemory(input_ids.device) as memory:
                    start = time.perf_counter()
                    hidden[which] = base(input_ids, attention_mask=attention_mask, use_cache=False)
                    synchronize(input_ids.device)
                    seconds[which].append(time.perf_counter() - start)
                plans[which] = seen.plan() if side in PLUGINS else None
                if peaks[which] is None:
                    peaks[which] = memory.bytes
        sums = _Statistics()
        length = input_ids.shape[1]
        for start in range(0, length, predictions.CHUNK):
            progress("comparing logits", start, length)
            end = min(start + predictions.CHUNK, length)
            logits = [predictions.logits_at(model, input_ids, output, start, end) for output in hidden]
            sums.add(logits[0], logits[1], input_ids, attention_mask, start, end)
    progress("comparing logits", length, length)
    medians = [statistics.median(s) for s in seconds]
    runs = [
        Run(side, dict(chosen), t, input_ids.numel() / t, peak, perplexity, tuple(each), plan)
        for (side, chosen), t, peak, perplexity, each, plan in zip(
            sides, medians, peaks, sums.perplexities(), seconds, plans, strict=True
        )
    ]
    return Agreement(
        tokens=input_ids.numel(),
        **sums.figures(),
        perplexity_ratio=runs[1].perplexity / runs[0].perplexity,
        speedup=medians[0] / medians[1],
        within_noise=overlap(*seconds),
        baseline=runs[0],
        plugin=runs[1],
    )


class _Statistics:
    """Figures gathered chunk by chunk, in float64."""

    def __init__(self) -> None:
        self.kl: list[Tensor] = []
        self.same: list[Tensor] = []
        self.squares, self.elements, self.largest = 0.0, 0, 0.0
        self.nll, self.predicted = [0.0, 0.0], 0

    def add(self, base: Tensor, other: Tensor, ids: Tensor, mask: Tensor | None, start: int, end: int) -> None:
        real = torch.ones_like(ids[:, start:end], dtype=torch.bool) if mask is None else mask[:, start:end].bool()
        p, q = predictions.log_probabilities(base), predictions.log_probabilities(other)
        self.kl.append(predictions.divergence(p, q)[real])
        self.same.append(predictions.same_first_choice(p, q)[real])
        difference = (p.exp() - q.exp()).abs()[real]
        self.squares += float(difference.square().sum())
        self.elements += difference.numel()
        self.largest = max(self.largest, float(difference.max()) if difference.numel() else 0.0)
        targets = ids[:, start + 1 : end + 1]
        count = targets.shape[1]
        counted = real[:, :count] if mask is None else real[:, :count] & mask[:, start + 1 : end + 1].bool()
        self.predicted += int(counted.sum())
        for i, logp in enumerate((p, q)):
            self.nll[i] -= float(predictions.of_tokens(logp[:, :count], targets)[counted].sum())

    def figures(self) -> dict[str, float]:
        kl = torch.cat(self.kl)
        return {
            "kl_mean": float(kl.mean()),
            "kl_median": float(kl.median()),
            "kl_p999": float(torch.quantile(kl, 0.999)),
            "kl_max": float(kl.max()),
            "top1": float(torch.cat(self.same).double().mean()),
            "max_probability_difference": self.largest,
            "rms_probability_difference": (self.squares / max(1, self.elements)) ** 0.5,
        }

    def perplexities(self) -> list[float]:
        return [float(torch.tensor(nll / max(1, self.predicted)).exp()) for nll in self.nll]


def overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two samples of timings cannot be told apart: their ranges overlap, or one has a single value."""
    return min(len(one), len(other)) < 2 or max(min(one), min(other)) <= min(max(one), max(other))
