"""Phase 2, explicit: questions over an encoded context, one after another or several in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.hf.compat import NAMES, cache_keyword
from hf_attn_plugins.hf.models.unwrap import language_model
from hf_attn_plugins.star.hf.cache import as_ids, branch, record_of
from hf_attn_plugins.star.hf.fingerprint import fingerprint
from hf_attn_plugins.star.hf.model import dense, frozen_rope, windows

OURS = ("return_dict_in_generate", "cache_implementation")


def ask(
    model: nn.Module,
    cache: Any,
    questions: Sequence[Tensor | Sequence[int]],
    *,
    together: int = 1,
    **generate: Any,
) -> list[Tensor]:
    """Generate an answer to each question; the cache is left as it is.

    Args:
        model: the model that encoded the context.
        cache: a star cache of one context.
        questions: token ids (T,) of each question, at least one token, cut from the joined prompt.
        together: questions in one batch; they share the context's tensors until they grow.
        **generate: for `model.generate`: sampling, beams, stop strings, a streamer (with together=1), and so on.

    Returns:
        The new token ids of each question, (N,), with whatever padding `generate` put behind an early end.

    Raises:
        ValueError: a cache of another model or of several contexts, an empty question, or an argument that `ask` sets.
    """
    record, model = record_of(cache), language_model(model)
    if fingerprint(model) != record.model:
        raise ValueError("this cache was encoded by another model: ask the model it came from.")
    if len(record.context_ids) != 1:
        raise ValueError(
            f"this cache holds {len(record.context_ids)} contexts: ask() takes one; call generate() yourself."
        )
    taken = {"input_ids", "inputs", "attention_mask", *NAMES, *OURS} & set(generate)
    if taken:
        raise ValueError(
            f"ask() sets {', '.join(sorted(taken))} itself: call model.generate over star.branch(cache) instead."
        )
    asked = [as_ids(question, "a question")[0] for question in questions]
    if any(not len(question) for question in asked):
        raise ValueError("a question needs at least one token.")
    answers: list[Tensor | None] = [None] * len(asked)
    for members in _batches([len(question) for question in asked], together, windows(model)[0] is not None):
        new = _generate(model, cache, [asked[i] for i in members], generate)
        copies = len(new) // len(members)  # num_return_sequences
        for place, index in enumerate(members):
            rows = new[place * copies : (place + 1) * copies]
            answers[index] = rows[0] if copies == 1 else rows
    return [answer for answer in answers if answer is not None]


def _batches(lengths: list[int], together: int, equal: bool) -> list[list[int]]:
    """Questions to ask together: of one length where the model has sliding layers, which count places, not tokens."""
    if together < 1:
        raise ValueError(f"together={together}: at least 1 question is asked at a time.")
    batches: list[list[int]] = []
    for index, length in enumerate(lengths):
        fits = batches and len(batches[-1]) < together and (not equal or lengths[batches[-1][0]] == length)
        if fits:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _generate(model: nn.Module, cache: Any, questions: list[Tensor], options: dict[str, Any]) -> Tensor:
    record = record_of(cache)
    longest = max(len(question) for question in questions)
    context = record.context_ids.expand(len(questions), -1)
    # Padding goes between context and question, where a mask and the positions that follow from it hide it.
    padded = torch.zeros(len(questions), longest, dtype=torch.long)
    real = torch.zeros_like(padded)
    for row, question in enumerate(questions):
        padded[row, longest - len(question) :] = question
        real[row, longest - len(question) :] = 1
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    input_ids = torch.cat([context, padded], 1).to(device)
    mask = torch.cat([torch.ones_like(context), real], 1).to(device)
    ours: dict[str, Any] = dict.fromkeys(OURS)  # whatever the model's generation config says of them
    ours |= {cache_keyword(model): branch(cache, len(questions)), "return_dict_in_generate": False}
    with dense(model), frozen_rope(model, record.max_length):
        output = model.generate(input_ids=input_ids, attention_mask=mask, **ours, **options)  # type: ignore[operator]
    return output[:, input_ids.shape[1] :].cpu()
