"""Predictions of the next token and how near two of them are: one computation for `compare`, `eval` and `bench`.

The formulas (n positions, p the baseline's log-probabilities and q the other's, in float64):
KL(p || q) = sum over the vocabulary of exp(p) (p - q); the same first choice: argmax p = argmax q.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor, nn

CHUNK = 256  # positions whose logits exist at a time, for each run


def log_probabilities(logits: Tensor) -> Tensor:
    """(..., V) logits of any float dtype as log-probabilities in nats, float64."""
    return logits.double().log_softmax(-1)


def divergence(base: Tensor, other: Tensor) -> Tensor:
    """KL(base || other) in nats, (...), of log-probabilities (..., V); a rounding error below 0 is 0."""
    return (base.exp() * (base - other)).sum(-1).clamp_min(0)


def same_first_choice(base: Tensor, other: Tensor) -> Tensor:
    """(...) bool: whether both log-probabilities (..., V) are largest at the same token."""
    return base.argmax(-1) == other.argmax(-1)


def of_tokens(log_probability: Tensor, tokens: Tensor) -> Tensor:
    """(...) the log-probabilities that (..., V) gives to token ids (...)."""
    return log_probability.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def backbone(model: nn.Module) -> nn.Module:
    """The model without its head, whose output holds the last hidden states.

    Raises:
        ValueError: the model has no output embeddings, or is an encoder-decoder.
    """
    base = getattr(model, "base_model", model)
    find: Any = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    if base is model or head is None:
        raise ValueError(f"{type(model).__name__} has no language-model head to compare: load a model for causal LM.")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder: compare a decoder, a model for causal LM.")
    return base


def logits_at(model: nn.Module, ids: Tensor, output: Any, start: int, end: int) -> Tensor:
    """(B, end - start, V) logits from the backbone's finished output, by the model's own head and its scalings.

    The whole model runs on those positions, with a backbone that returns their finished hidden states at once.

    Args:
        ids: (B, T) token ids.
        output: what `backbone(model)` returned for them, with `last_hidden_state` (B, T, D).
    """
    return logits_of(model, ids[:, start:end], output, output.last_hidden_state[:, start:end])


def log_probabilities_at(model: nn.Module, ids: Tensor, output: Any, places: Tensor) -> Tensor:
    """(n, V) log-probabilities of one text at positions `places` (n,), from the backbone's output for `ids` (1, T)."""
    return log_probabilities(logits_of(model, ids[:, places], output, output.last_hidden_state[:, places])[0])


def logits_of(model: nn.Module, ids: Tensor, output: Any, states: Tensor) -> Tensor:
    """(B, n, V) logits, as `logits_at`, for finished hidden states (B, n, D) and token ids (B, n) of any positions."""
    base = backbone(model)
    part = dataclasses.replace(output, last_hidden_state=states)
    hooked = vars(base).get("forward")  # what Accelerate has put there, where it has
    base.forward = lambda *_, **__: part  # type: ignore[method-assign]
    try:
        return model(ids, use_cache=False).logits
    finally:
        if hooked is None:
            del base.forward
        else:
            base.forward = hooked  # type: ignore[method-assign]
