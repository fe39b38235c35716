"""What the ranks do in the tests: functions of (rank, size, ...) that return JSON-ready values."""

from __future__ import annotations

from typing import Any

import torch

import hf_attn_plugins as hap
from tests.parallel.models import build, prompt

ONLY_PARALLEL = ("anchor",)


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
    **sampling: Any,
) -> dict[str, Any]:
    """Tokens and the error of the logits against one process, and what this rank did."""
    model, options = build(family, dtype), options or {}
    inputs = prompt(**(given or dict(length=23, batch=2)))
    arguments = dict(max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True)
    arguments |= sampling
    with hap.context_parallel(model, name, timeout=30, **options) as cp:
        state = cp.group.objects(torch.get_rng_state())[0]
        found = model.generate(**inputs, **arguments)
        with torch.no_grad():
            logits = model(**inputs).logits
        report = {
            "traffic": cp.traffic().as_dict(),
            "cache": cp.cache_bytes,
            "prefill": cp.prefill_tokens,
            "loads": getattr(found.past_key_values, "loads", None),
        }
    report |= {"tokens": found.sequences.tolist(), "implementation": model.config._attn_implementation}
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
