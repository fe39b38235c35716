"""Text to tokens as a tokenizer means it: what it puts before a text, and its chat template around a message."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# How templates begin a model's reasoning, and how they end it.
THOUGHTS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<reason>", "</reason>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
# What stands before a message whose template wrote the list [{"type": "text", "text": message}] out as it is.
PRINTED_LIST = re.compile(r"""["']text["']: ["']$""")


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template writes it: what stands before the user's message, the message, what follows."""

    before: str
    message: str
    after: str

    @property
    def text(self) -> str:
        return self.before + self.message + self.after

    @property
    def open_thought(self) -> str | None:
        """The tag of a thought that the template leaves open at its end, such as "<think>", or None."""
        for begin, end in THOUGHTS:
            if begin in self.after and end not in self.after[self.after.rindex(begin) :]:
                return begin
        return None


def ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text, nothing added."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def opening(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text, such as its BOS; none for many.

    What it puts behind a text (an EOS) is left out: a prompt goes on.
    """
    bare, dressed = ids(tokenizer, "a"), list(tokenizer("a")["input_ids"])
    for start in range(len(dressed) - len(bare) + 1):
        if bare and dressed[start : start + len(bare)] == bare:
            return dressed[:start]
    special = set(tokenizer.all_special_ids)  # pieces differ beside a special token: count those in front
    return dressed[: next((i for i, token in enumerate(dressed) if token not in special), 0)]


def render(
    tokenizer: Any, message: str, *, system: str | None = None, arguments: Mapping[str, Any] | None = None
) -> Rendered:
    """A user's message in the tokenizer's chat template, up to the header of the assistant's turn.

    The template renders the message itself, and a second, unlike one: what both results begin and end with is the
    frame. What stands between is accepted as the message when it is the message as it was written, without white space
    at its ends, or escaped as in JSON, a Python literal or HTML. Where the template shows nothing of a text content,
    the message is passed as a list of one part.

    Args:
        arguments: further variables of the template, such as enable_thinking.

    Raises:
        ValueError: the message does not stand in the result exactly once, or the template failed.
    """
    problem = "the chat template does not show the user's message exactly once, as it was written"
    for as_list in (False, True):
        try:
            texts = [_applied(tokenizer, x, system, as_list, arguments) for x in (message, _unlike(message))]
        except Exception as error:  # templates raise errors of Jinja and of their own
            if not as_list:
                problem = f"the chat template failed: {type(error).__name__}: {' '.join(str(error).split())}"
            continue
        found = _located(texts, message)
        if found is not None and not (as_list and PRINTED_LIST.search(found.before)):
            return found
    raise ValueError(
        problem.rstrip(".")
        + ": leave it aside (--chat no, chat=False), or set its variables (--template-arg NAME=VALUE)."
    )


def common(sequences: Sequence[Sequence[Any]]) -> int:
    """Number of leading elements that all sequences have in common."""
    shortest = min(map(len, sequences))
    low, high = 0, shortest  # compared by halves: slices compare at the speed of memory, elements do not
    first = sequences[0]
    while low < high:
        middle = (low + high + 1) // 2
        if all(other[low:middle] == first[low:middle] for other in sequences[1:]):
            low = middle
        else:
            high = middle - 1
    return low


def common_end(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of trailing elements that two sequences have in common."""
    return common([one[::-1], other[::-1]])


def _applied(
    tokenizer: Any, content: str, system: str | None, as_list: bool, arguments: Mapping[str, Any] | None
) -> str:
    def turn(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if as_list else text}

    turns = [turn("system", system)] if system is not None else []
    turns.append(turn("user", content))
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **(arguments or {}))


def _unlike(message: str) -> str:
    """Two letters that the message neither begins nor ends with, white space aside."""
    bare = message.strip()
    ends = {*message[:1].lower(), *message[-1:].lower(), *bare[:1].lower(), *bare[-1:].lower()}
    return "".join([letter for letter in "qxzjkw" if letter not in ends][:2])


def _located(texts: list[str], message: str) -> Rendered | None:
    whole, other = texts
    head = common([whole, other])
    tail = min(common_end(whole, other), len(whole) - head, len(other) - head)
    if other[head : len(other) - tail] != _unlike(message):  # the probe itself must stand there once
        return None
    shown = whole[head : len(whole) - tail]
    return Rendered(whole[:head], shown, whole[len(whole) - tail :]) if shown in _forms(message) else None


def _forms(message: str) -> set[str]:
    """The message in the forms that templates give it."""
    forms = set()
    for text in {message, message.strip(), message.lstrip(), message.rstrip()}:
        forms |= {text, html.escape(text), html.escape(text).replace("&#x27;", "&#39;").replace("&quot;", "&#34;")}
        forms |= {json.dumps(text, ensure_ascii=ascii_)[1:-1] for ascii_ in (False, True)}
        forms.add(repr(text)[1:-1])
        jinja = json.dumps(text)[1:-1]  # Jinja's own tojson escapes for HTML as well
        for sign in "<>&'":
            jinja = jinja.replace(sign, f"\\u{ord(sign):04x}")
        forms.add(jinja)
    return forms | {re.sub(r"\r\n?", "\n", form) for form in forms}
