"""`compare`: how far a plugin's predictions are from another backend's on the same tokens, and at what cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.bench.peak_memory import PeakMemory
from hf_attn_plugins.bench.timing import synchronize
from hf_attn_plugins.hf import predictions
from hf_attn_plugins.hf.agreement import Agreement, Comparison, Run
from hf_attn_plugins.hf.configure import use
from hf_attn_plugins.hf.inputs.arguments import attention
from hf_attn_plugins.hf.models.evaluating import evaluating
from hf_attn_plugins.hf.models.families import own_backend
from hf_attn_plugins.hf.models.unwrap import language_model
from hf_attn_plugins.hf.trace import trace
from hf_attn_plugins.plugins import PLUGINS
from hf_attn_plugins.ui.progress import Progress
from hf_attn_plugins.ui.progress import python as shown

__all__ = ["Agreement", "Comparison", "Run", "compare", "compare_all"]
Named = str | tuple[str, Mapping[str, Any]]


def compare(
    model: nn.Module,
    input_ids: Tensor,
    name: str,
    *,
    baseline: str | None = None,
    attention_mask: Tensor | None = None,
    repeats: int = 2,
    progress: Progress | bool | None = None,
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
        progress: called with (what, done, total); None for a bar in notebooks and terminals, False for none.

    Returns:
        `Agreement`.

    Raises:
        ValueError: fewer than two tokens, an unknown plugin or option, or a model the plugin cannot be used with.
    """
    return compare_all(
        model,
        input_ids,
        [(name, options)],
        baseline=baseline,
        attention_mask=attention_mask,
        repeats=repeats,
        progress=progress,
    )[0]


def compare_all(
    model: nn.Module,
    input_ids: Tensor,
    attentions: Sequence[Named],
    *,
    lengths: Sequence[int] | None = None,
    baseline: str | None = None,
    attention_mask: Tensor | None = None,
    repeats: int = 2,
    progress: Progress | bool | None = None,
) -> Comparison:
    """`compare` for several attentions at several lengths; a round times all of them and the baseline once.

    Args:
        attentions: names such as "tiled_attention" or "star_attention:block_size=512", or pairs (name, options).
        lengths: the first so many tokens of `input_ids`, one after the other; None: all of them.
        model, input_ids, baseline, attention_mask, repeats, progress: as in `compare`.

    Returns:
        `Comparison`: by length, then in the order of `attentions`.

    Raises:
        ValueError: as in `compare`; no attention, or a length that the tokens do not reach.
    """
    if input_ids.ndim != 2 or input_ids.shape[1] < 2:
        raise ValueError(f"input_ids must be (batch, tokens) with at least 2 tokens, got {tuple(input_ids.shape)}.")
    if repeats < 1:
        raise ValueError(f"repeats={repeats}: at least 1 is needed.")
    named = [_named(each) for each in attentions]
    if not named:
        raise ValueError("attentions is empty: name at least one, such as 'tiled_attention'.")
    lengths = [input_ids.shape[1]] if lengths is None else list(lengths)
    for length in lengths:
        if not 2 <= length <= input_ids.shape[1]:
            raise ValueError(f"length {length}: 2 to {input_ids.shape[1]} tokens of input_ids can be compared.")
    inner = language_model(model)
    sides = [(baseline or own_backend(inner), {}), *named]
    found: list[Agreement] = []
    with shown(progress) as report, torch.inference_mode(), evaluating(inner):
        for number, length in enumerate(lengths):
            ahead, whole = sum(lengths[:number]), sum(lengths)

            def at(what: str, part: float, ahead: int = ahead, whole: int = whole, length: int = length) -> None:
                report(what, round(1000 * (ahead + part * length) / whole), 1000)

            mask = None if attention_mask is None else attention_mask[:, :length]
            found += _at_length(inner, input_ids[:, :length], mask, sides, repeats, at)
    return Comparison(tuple(found))


def _named(each: Named) -> tuple[str, dict[str, Any]]:
    if isinstance(each, str):
        parsed = attention(each)
        return parsed.implementation, parsed.options
    return each[0], dict(each[1])


def _at_length(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    sides: Sequence[tuple[str, dict[str, Any]]],
    repeats: int,
    progress: Callable[[str, float], None],
) -> list[Agreement]:
    """The first of `sides` is the baseline; `progress` is told what comes next and the share that is done."""
    base, count = predictions.backbone(model), len(sides)
    seconds: list[list[float]] = [[] for _ in sides]
    peaks: list[int | None] = [None] * count
    hidden: list[Any] = [None] * count
    plans: list[str | None] = [None] * count
    progress("warming up", 0.0)
    for side, chosen in sides:  # one short run each: lazy set-up is not attention's cost
        with use(model, side, **chosen):
            base(input_ids[:, : min(256, input_ids.shape[1])], use_cache=False)
    total = count * (repeats + 1)  # comparing logits takes about as long as one more prefill of each
    for number in range(count * repeats):
        which = number % count
        side, chosen = sides[which]
        progress(f"prefill {number + 1} of {count * repeats}: {side}", number / total)
        hidden[which] = None
        with use(model, side, **chosen), trace(model) as seen, PeakMemory(input_ids.device) as memory:
            start = time.perf_counter()
            hidden[which] = base(input_ids, attention_mask=attention_mask, use_cache=False)
            synchronize(input_ids.device)
            seconds[which].append(time.perf_counter() - start)
        plans[which] = seen.plan() if side in PLUGINS else None
        if peaks[which] is None:
            peaks[which] = memory.bytes
    sums = [_Statistics() for _ in sides[1:]]
    length = input_ids.shape[1]
    for begin in range(0, length, predictions.CHUNK):
        progress("comparing predictions", (repeats + begin / length) / (repeats + 1))
        end = min(begin + predictions.CHUNK, length)
        logits = [predictions.logits_at(model, input_ids, output, begin, end) for output in hidden]
        for each, other in zip(sums, logits[1:], strict=True):
            each.add(logits[0], other, input_ids, attention_mask, begin, end)
    progress("comparing predictions", 1.0)

    def run(which: int, perplexity: float) -> Run:
        (side, chosen), median = sides[which], statistics.median(seconds[which])
        speed = input_ids.numel() / median
        return Run(
            side, dict(chosen), median, speed, peaks[which], perplexity, tuple(seconds[which]), plans[which]
        )  # fmt: skip

    found = []
    for which, each in enumerate(sums, start=1):
        theirs, ours = (run(i, perplexity) for i, perplexity in zip((0, which), each.perplexities(), strict=True))
        found.append(
            Agreement(
                tokens=input_ids.numel(),
                **each.figures(),
                perplexity_ratio=ours.perplexity / theirs.perplexity,
                speedup=theirs.seconds / ours.seconds,
                within_noise=overlap(theirs.repeats, ours.repeats),
                baseline=theirs,
                plugin=ours,
            )
        )
    return found


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
