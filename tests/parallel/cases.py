"""What the ranks do in the tests: functions of (rank, size, ...) that return JSON-ready values."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import DynamicCache

import hf_attn_plugins as hap
from tests.parallel.models import build, prompt

ONLY_PARALLEL = ("anchor", "rounds", "exchange", "min_turn")


def one_process(model: Any, name: str, options: dict[str, Any]) -> Any:
    """The reference: the plugin itself, in this process alone."""
    return hap.use(model, name, **{key: value for key, value in options.items() if key not in ONLY_PARALLEL})


def generate(
    rank: int,
    size: int,
    family: str = "llama",
    name: str = "star_attention",
    options: dict[str, Any] | None = None,
    given: dict[str, Any] | None = None,
    dtype: str = "float64",
    assistant: float | None = None,
    **sampling: Any,
) -> dict[str, Any]:
    """Tokens and the error of the logits against one process, and what this rank did.

    `assistant`: assisted decoding by the same model with so much noise in its weights.
    """
    model, options = build(family, dtype), options or {}
    inputs = prompt(**(given or dict(length=23, batch=2)))
    arguments = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    arguments |= sampling
    if assistant is not None:
        arguments["assistant_model"] = noisy(model, assistant)
    torch.manual_seed(rank)
    before = model.config._attn_implementation
    with hap.context_parallel(model, name, timeout=30, **options) as cp:
        state = cp.group.objects(torch.get_rng_state())[0]
        found = model.generate(**inputs, **arguments)
        with torch.no_grad():
            logits = model(**inputs).logits
        report = {
            "traffic": cp.traffic().as_dict(),
            "cache": cp.cache_bytes,
            "prefill": cp.prefill_tokens,
            "loads": cp.loads,
        }
    report |= {
        "tokens": found.sequences.tolist(),
        "implementation": model.config._attn_implementation,
        "before": before,
    }
    if rank:  # the reference once
        return report
    torch.set_rng_state(state)
    with one_process(model, name, options), torch.no_grad():
        wanted = model.generate(**inputs, **arguments)
        reference = model(**inputs).logits
    with one_process(model, "tiled_attention", {}), torch.no_grad():
        dense = model(**inputs).logits
    real = inputs["attention_mask"].bool()
    steps = [(a - b).abs().max().item() for a, b in zip(wanted.logits, found.logits, strict=True)]
    return {
        "wanted": wanted.sequences.tolist(),
        "error": max(steps),
        "prefill error": (logits - reference)[real].abs().max().item(),
        "from dense": (dense - reference)[real].abs().max().item(),
        "scale": reference[real].abs().max().item(),
        **report,
    }


def noisy(model: Any, noise: float) -> Any:
    """A copy of a model whose weights are off by a share of their size, and which counts its forwards."""
    other, generator = copy.deepcopy(model), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1 + noise * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return other


def turns(
    rank: int, size: int, name: str = "star_attention", options: dict[str, Any] | None = None, family: str = "llama"
) -> dict[str, Any]:
    """Two questions one after another on one cache, in two sessions."""
    model, options = build(family), options or {}
    first, second = prompt(length=23, batch=2, padding=4), prompt(length=9, batch=2, seed=1)
    arguments = dict(max_new_tokens=5, do_sample=False, return_dict_in_generate=True, output_logits=True)

    def talk(session: Any) -> tuple[Any, Any, Any]:
        with session():
            # All keys are kept, also of sliding layers in one process.
            one = model.generate(**first, past_key_values=DynamicCache(), **arguments)
        ids = torch.cat([one.sequences, second["input_ids"]], 1)
        mask = torch.cat([first["attention_mask"], torch.ones(2, ids.shape[1] - 23, dtype=torch.long)], 1)
        before = list(getattr(one.past_key_values, "loads", []))
        with session() as cp:
            two = model.generate(input_ids=ids, attention_mask=mask, past_key_values=one.past_key_values, **arguments)
        return before, two, cp

    before, two, cp = talk(lambda: hap.context_parallel(model, name, timeout=30, **options))
    report = {
        "tokens": two.sequences.tolist(),
        "loads": getattr(two.past_key_values, "loads", None),
        "before": before,
        "traffic": cp.traffic().as_dict(),
        "computed": cp.prefill_tokens,
        "summary": cp.summary(),
    }
    if not rank:
        _, wanted, _ = talk(lambda: one_process(model, name, options))
        steps = [(a - b).abs().max().item() for a, b in zip(wanted.logits, two.logits, strict=True)]
        report |= {"wanted": wanted.sequences.tolist(), "error": max(steps)}
    return report


class Heard:
    """A streamer that remembers."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def streamed(rank: int, size: int) -> dict[str, Any]:
    """A streamer on rank 0 only, and an end-of-sequence token that comes early."""
    model, inputs = build("llama"), prompt(length=23, batch=1)
    with one_process(model, "tiled_attention", {}):
        plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist()
    heard = Heard() if rank == 0 else None
    with hap.context_parallel(model, "tiled_attention", timeout=30):
        found = model.generate(**inputs, max_new_tokens=6, do_sample=False, streamer=heard, eos_token_id=plain[25])[
            0
        ].tolist()
    return {"plain": plain, "tokens": found, "heard": heard.tokens if heard else None}
