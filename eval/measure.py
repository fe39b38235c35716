"""The measurements: greedy answers with their timing, loss by position, agreement with a baseline's predictions."""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.bench.peak_memory import PeakMemory
from hf_attn_plugins.bench.timing import synchronize
from hf_attn_plugins.hf import predictions
from hf_attn_plugins.hf.compat import cache_keyword, returned_cache

BUCKETS = 8  # ranges of positions that loss and agreement are reported for


@dataclass(frozen=True)
class Answer:
    """Generated tokens; seconds: prefill, first_token (prefill included), decode (all later tokens), total."""

    token_ids: list[int]
    seconds: dict[str, float]
    peak_bytes: int | None


class _Clock:
    """Notes when logits and tokens come, as `generate` calls it: a logits processor and a stopping criterion."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.logits, self.tokens = device, [], []  # type: tuple[Any, list[float], list[float]]
        self.start = time.perf_counter()

    def now(self) -> float:
        synchronize(self.device)
        return time.perf_counter() - self.start

    def on_logits(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.logits.append(self.now())
        return scores

    def on_token(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.tokens.append(self.now())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def answer(
    model: Any,
    ids: list[int],
    max_new_tokens: int,
    *,
    to_the_end: bool = False,
    eos: int | Sequence[int] | None = None,
) -> Answer:
    """Greedy decoding by the model's own `generate`.

    Args:
        to_the_end: generate exactly `max_new_tokens`, whatever the model says; otherwise the answer ends at an EOS.
        eos: ids that end an answer beside those of the model's generation config, such as the tokenizer's.
    """
    from transformers import GenerationConfig

    device = model.device
    inputs = torch.tensor([ids], device=device)
    end = ends(model, eos)
    settings = GenerationConfig(
        do_sample=False,
        num_beams=1,
        num_return_sequences=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        max_new_tokens=max_new_tokens,
        min_new_tokens=max_new_tokens if to_the_end else None,
        eos_token_id=end or None,
        pad_token_id=end[0] if end else None,
        return_dict_in_generate=False,
    )
    with PeakMemory(device) as memory:
        clock = _Clock(device)
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=settings,
            logits_processor=[clock.on_logits],
            stopping_criteria=[clock.on_token],
        )
        total = clock.now()
    seconds = {
        "prefill": clock.logits[0],
        "first_token": clock.tokens[0],
        "decode": clock.tokens[-1] - clock.tokens[0],
        "total": total,
    }
    return Answer(output[0, len(ids) :].tolist(), seconds, memory.bytes)


def ends(model: Any, eos: int | Sequence[int] | None = None) -> list[int]:
    """Every token that ends an answer: those of the model's generation config, and `eos`; each once."""
    of_model = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return list(dict.fromkeys([*_several(of_model), *_several(eos)]))


def answer_logits(model: Any, ids: list[int], answer_ids: list[int]) -> Tensor:
    """(n, V) logits at which the n tokens of an answer behind a prompt are predicted; see `answers_logits`."""
    return answers_logits(model, ids, [([], answer_ids)])[0]


@torch.inference_mode()
def answers_logits(model: Any, ids: list[int], asked: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
    """For each (question, answer) behind a document, (n, V) logits at which the answer's n tokens are predicted.

    The document is prefilled once into an empty cache, as for generating. Then the tokens of a question, which may be
    none, and of its answer are run over a copy of that cache in one call, as a later turn is. An attention that treats
    a prefill otherwise than later tokens is so measured as it answers.

    Raises:
        ValueError: an empty answer.
    """
    if not all(answer for _, answer in asked):
        raise ValueError("an answer without tokens has no likelihood.")
    inputs = torch.tensor([ids], device=model.device)
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    filled = model(inputs, use_cache=True, **last_only)
    found = []
    for question, answer in asked:
        logits, fed = filled.logits[0, -1:], [*question, *answer[:-1]]
        if fed:
            held = returned_cache(filled)
            mask = torch.ones(1, len(ids) + len(fed), dtype=torch.long, device=model.device)
            cache = {cache_keyword(model): held if len(asked) == 1 else copy.deepcopy(held)}
            turn = model(torch.tensor([fed], device=model.device), attention_mask=mask, use_cache=True, **cache)
            logits = torch.cat([logits, turn.logits[0]])
        found.append(logits[-len(answer) :])
    return found


def reference_nll(model: Any, ids: list[int], answer_ids: list[int]) -> float:
    """Negative log-likelihood in nats of an answer behind a prompt, summed over the answer's tokens.

    Raises:
        ValueError: an empty answer.
    """
    logp = predictions.log_probabilities(answer_logits(model, ids, answer_ids))
    picked = predictions.of_tokens(logp, torch.tensor(answer_ids, device=logp.device))
    return float(-picked[0] - picked[1:].sum())


@dataclass(frozen=True)
class Hidden:
    """The last hidden states of a whole text, from which logits are formed chunk by chunk."""

    output: Any
    seconds: float
    peak_bytes: int | None


@torch.inference_mode()
def hidden(model: Any, ids: list[int]) -> Hidden:
    """Run a text (T ids) through the model's backbone."""
    inputs = torch.tensor([ids], device=model.device)
    with PeakMemory(model.device) as memory:
        start = time.perf_counter()
        output = predictions.backbone(model)(inputs, use_cache=False)
        synchronize(model.device)
        seconds = time.perf_counter() - start
    return Hidden(output, seconds, memory.bytes)


@torch.inference_mode()
def losses(model: Any, ids: list[int], states: Hidden) -> Tensor:
    """(T - 1,) negative log-likelihoods in nats of tokens 1 .. T - 1, float64 on the CPU."""
    found = []
    _chunks(model, ids, [states], lambda logp, targets: found.append(predictions.of_tokens(logp[0], targets)))
    return torch.cat(found).neg().cpu()


def loss_buckets(nll: Tensor) -> list[dict[str, float]]:
    """Sums of (n,) losses over `BUCKETS` ranges of positions."""
    return [
        {"begin": begin, "end": end, "nll_sum": float(nll[begin:end].sum()), "count": end - begin}
        for begin, end in ranges(len(nll))
    ]


@torch.inference_mode()
def agreement(model: Any, ids: list[int], base: Hidden, other: Hidden) -> dict[str, Any]:
    """The figures of `records.Agreement` for two runs over the same T ids.

    Logits exist for a chunk of positions at a time. All figures are over the T - 1 positions whose next token is known.
    """
    parts: dict[str, list[Tensor]] = {"kl": [], "top1": [], "nll": [], "baseline_nll": []}

    def add(logp: list[Tensor], targets: Tensor) -> None:
        p, q = logp
        parts["kl"].append(predictions.divergence(p, q))
        parts["top1"].append(predictions.same_first_choice(p, q).double())
        parts["nll"].append(-predictions.of_tokens(q, targets))
        parts["baseline_nll"].append(-predictions.of_tokens(p, targets))

    _chunks(model, ids, [base, other], add)
    whole = {name: torch.cat(values).cpu() for name, values in parts.items()}
    kl, ratio = whole["kl"], whole["nll"] - whole["baseline_nll"]
    difference = (-whole["nll"]).exp() - (-whole["baseline_nll"]).exp()
    return {
        "positions": len(kl),
        "kl": {
            "mean": float(kl.mean()),
            "median": float(kl.median()),
            "p99": float(torch.quantile(kl, 0.99)),
            "max": float(kl.max()),
        },
        "top1": float(whole["top1"].mean()),
        "rms_dp": float(difference.square().mean().sqrt()),
        "log_ppl_ratio": float(ratio.mean()),
        "log_ppl_ratio_se": float(ratio.std() / math.sqrt(len(ratio))) if len(ratio) > 1 else 0.0,
        "buckets": [
            {
                "begin": begin,
                "end": end,
                **{name: float(values[begin:end].mean()) for name, values in whole.items()},
                "count": end - begin,
            }
            for begin, end in ranges(len(kl))
        ],
    }


def ranges(length: int) -> list[tuple[int, int]]:
    """0 .. length in at most `BUCKETS` ranges of nearly equal size, none empty."""
    edges = [round(i * length / BUCKETS) for i in range(BUCKETS + 1)]
    return [(begin, end) for begin, end in itertools.pairwise(edges) if begin < end]


def _chunks(model: Any, ids: list[int], runs: list[Hidden], use: Callable[[list[Tensor], Tensor], object]) -> None:
    """Call `use` with each run's log-probabilities (n, V) in float64, and the n tokens that follow, chunk by chunk."""
    inputs = torch.tensor([ids], device=model.device)
    for start in range(0, len(ids) - 1, predictions.CHUNK):
        end = min(start + predictions.CHUNK, len(ids) - 1)
        logp = [
            predictions.log_probabilities(predictions.logits_at(model, inputs, run.output, start, end)[0])
            for run in runs
        ]
        use(logp, inputs[0, start + 1 : end + 1])


def _several(value: Any) -> list[int]:
    """A setting that holds nothing, one id or several, as a list."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        value = value.tolist()
    return [int(one) for one in value] if isinstance(value, (list, tuple)) else [int(value)]
