"""Passkeys in real prose: prompts of an exact length that ask for a number, and how well a model answers them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.hf.compat import cache_keyword, returned_cache

NEEDLE = " The secret magic number for {city} is {number}."
TASK = "Somewhere in the text below a secret magic number is hidden. Read the text and remember the number.\n\n"
QUESTION = "\n\nWhat is the secret magic number for {city}?"
ANSWER = "The secret magic number for {city} is"
CITIES = ("Paris", "Lima", "Cairo", "Oslo", "Quito")


@dataclass(frozen=True)
class Passkey:
    """A prompt (T,) that ends directly before the number, and the tokens of the number."""

    prompt: Tensor
    answer: Tensor


@dataclass(frozen=True)
class Score:
    """Mean negative log-likelihood of the answer's tokens in nats, and whether greedy decoding gives it."""

    nll: float
    exact: bool


def passkey(tokenizer: Any, haystack: Tensor, length: int, depth: float, seed: int) -> Passkey:
    """A passkey prompt of exactly `length` tokens with the number at `depth` (0 = head, 1 = tail) of the text.

    Args:
        haystack: (n,) token ids of prose, at least `length` of them.

    Raises:
        ValueError: the haystack or the length is too short.
    """
    draw = random.Random(f"{seed} {depth} {length}")
    names = {"city": draw.choice(CITIES), "number": str(draw.randrange(10_000, 100_000))}
    mark = "\x1d"  # replaced by the text
    message = TASK + mark + QUESTION.format(**names)
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": message}]
        frame = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    else:
        frame = message + "\n\n"
    before, after = (frame + ANSWER.format(**names)).split(mark)

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    head, tail, needle, answer = ids(before), ids(after), ids(NEEDLE.format(**names)), ids(" " + names["number"])
    room = length - len(head) - len(tail) - len(needle)
    if room < 1 or room > len(haystack):
        raise ValueError(f"a passkey prompt of {length} tokens cannot be made from {len(haystack)} tokens of text.")
    text = haystack[:room].tolist()
    place = _sentence_end(tokenizer, text, round(depth * room))
    prompt = [*head, *text[:place], *needle, *text[place:], *tail]
    return Passkey(torch.tensor(prompt), torch.tensor(answer))


def _sentence_end(tokenizer: Any, text: list[int], near: int) -> int:
    """The first index from `near` on that follows the end of a sentence; `near` if there is none."""
    for place in range(near, min(near + 200, len(text))):
        if place and tokenizer.decode([text[place - 1]]).rstrip(" ").endswith((".", "\n")):
            return place
    return near


@torch.inference_mode()
def score(model: Any, task: Passkey) -> Score:
    """Prefill the prompt, then score the number token by token over the cache, as in generation."""
    device = model.device
    answer = task.answer.to(device)
    filled = model(task.prompt[None].to(device), use_cache=True, logits_to_keep=1)
    rest = model(answer[None, :-1], use_cache=True, **{cache_keyword(model): returned_cache(filled)})
    logits = torch.cat([filled.logits[0], rest.logits[0]]).float()
    picked = logits.log_softmax(-1).gather(1, answer[:, None])
    return Score(-picked.mean().item(), bool((logits.argmax(-1) == answer).all()))
