"""Needles in a haystack: how they are hidden, for RULER's tasks, and the passkeys that `hf-attn bench star` and
`front` ask for.

A passkey is a number in real prose. Its prompt has an exact length and ends directly before the number.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from hf_attn_plugins.hf.inputs.chat import ids, render

Unit = TypeVar("Unit")

NEEDLE = " The secret magic number for {city} is {number}."
TASK = "Somewhere in the text below a secret magic number is hidden. Read the text and remember the number.\n\n"
QUESTION = "\n\nWhat is the secret magic number for {city}?"
ANSWER = "The secret magic number for {city} is"
CITIES = ("Paris", "Lima", "Cairo", "Oslo", "Quito")
MARK = "\x1d"  # stands for the prose while the chat template is applied
SEARCHED = 200  # tokens behind the wanted place, among which the end of a sentence is looked for


def hide(haystack: Sequence[Unit], needles: Sequence[Sequence[Unit]], places: Sequence[int]) -> list[Unit]:
    """The haystack (sentences, or token ids) with each needle in front of the unit that `places` gives for it.

    Places count units of the haystack alone. Of two needles at one place, the later one of `needles` comes first.
    """
    found = list(haystack)
    for needle, place in sorted(zip(needles, places, strict=True), key=lambda pair: -pair[1]):
        found[place:place] = needle  # from the end, so that the places before it stay
    return found


@dataclass(frozen=True)
class Passkey:
    """Token ids of a prompt, which ends directly before the number, and of the number."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True)
class Passkeys:
    """Token ids of a document that hides several numbers, and a question for each.

    The document and a question's tokens behind it are a whole prompt, which ends directly before the number.
    """

    document: list[int]
    asked: tuple[Passkey, ...]


def passkey(tokenizer: Any, prose: Sequence[int], length: int, depth: float, seed: int) -> Passkey:
    """A passkey prompt of exactly `length` tokens with the number at `depth` (0 = head, 1 = tail) of the prose.

    The pieces of the prompt are tokenised one by one, so that the prose has the same ids at every depth.

    Args:
        prose: token ids, at least as many as the prompt has room for; the first ones are taken.
        seed: with depth and length it draws the city and the number.

    Raises:
        ValueError: the prose or the length is too short, or the chat template does not show the message once.
    """
    draw = random.Random(f"{seed} {depth} {length}")
    names = {"city": draw.choice(CITIES), "number": str(draw.randrange(10_000, 100_000))}
    whole = _document(tokenizer, prose, length, {depth: names})
    return Passkey([*whole.document, *whole.asked[0].prompt], whole.asked[0].answer)


def passkeys(tokenizer: Any, prose: Sequence[int], length: int, depths: Sequence[float], seed: int) -> Passkeys:
    """A document with a number at each depth, of a city of its own, and a question for each, in the order of depths.

    With the longest question the prompt has exactly `length` tokens. Arguments and errors as for `passkey`; at most
    as many depths as `CITIES`.
    """
    draw = random.Random(f"{seed} {length}")
    cities = draw.sample(CITIES, len(depths))
    hidden = {
        depth: {"city": city, "number": str(draw.randrange(10_000, 100_000))}
        for depth, city in zip(depths, cities, strict=True)
    }
    return _document(tokenizer, prose, length, hidden)


def _document(tokenizer: Any, prose: Sequence[int], length: int, hidden: Mapping[float, Mapping[str, str]]) -> Passkeys:
    """Prose with numbers at some depths; for each the names of its city and number are given."""
    asked, head = [], []
    for names in hidden.values():
        message = TASK + MARK + QUESTION.format(**names)
        has_template = bool(getattr(tokenizer, "chat_template", None))
        frame = render(tokenizer, message).text if has_template else message + "\n\n"
        before, after = (frame + ANSWER.format(**names)).split(MARK)
        head = ids(tokenizer, before)
        asked.append(Passkey(ids(tokenizer, after), ids(tokenizer, " " + names["number"])))
    needles = [ids(tokenizer, NEEDLE.format(**names)) for names in hidden.values()]
    room = length - len(head) - max(len(each.prompt) for each in asked) - sum(map(len, needles))
    if room < 1 or room > len(prose):
        raise ValueError(
            f"a passkey prompt of {length} tokens cannot be made from {len(prose)} tokens of text: {length - room} go "
            "to question and number. Ask for a longer prompt, or give a longer text."
        )
    text = list(prose[:room])
    places = [_sentence_end(tokenizer, text, round(depth * room)) for depth in hidden]
    return Passkeys([*head, *hide(text, needles, places)], tuple(asked))


def _sentence_end(tokenizer: Any, text: list[int], near: int) -> int:
    """The first index from `near` on that follows the end of a sentence; `near` if there is none."""
    for place in range(near, min(near + SEARCHED, len(text))):
        if place and tokenizer.decode([text[place - 1]]).rstrip(" ").endswith((".", "\n")):
            return place
    return near
