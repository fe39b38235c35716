"""Prompts as token ids: the chat frame, the answer prefix after its header, and the exact length."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

MARK = "\x1dhere\x1d"  # where the user's text goes while the chat template is applied
CHATS = ("auto", "yes", "no")


@dataclass(frozen=True)
class Parts:
    """One question, before it is cut to a length.

    Attributes:
        context: everything up to the end of the haystack, instructions before it included.
        question: what follows the haystack in the user's turn.
        answer_prefix: how the answer begins; it stands after the header of the assistant's turn.
        filler: haystack without an answer in it, whose first tokens fill the context up to the exact length.
        chat: False where the task's own rules leave the chat template out.
    """

    context: str
    question: str
    answer_prefix: str = ""
    filler: str = ""
    chat: bool = True


class Prompter:
    """Turns parts into token ids for one tokenizer.

    With a chat template, the user's turn holds context and question, and the answer prefix follows the header of the
    assistant's turn, as in RULER. Without one (a base model) the prompt is plain text: what the tokenizer itself puts
    in front (a BOS, where it has one), context, question, answer prefix.

    Args:
        chat: "auto" (the template where there is one), "yes" or "no".

    Raises:
        ValueError: chat="yes" for a tokenizer without a template.
    """

    def __init__(self, tokenizer: Any, chat: str = "auto") -> None:
        if chat not in CHATS:
            raise ValueError(f"chat={chat!r} is unknown: choose one of {', '.join(CHATS)}.")
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if chat == "yes" and not has_template:
            raise ValueError("this tokenizer has no chat template: use chat 'auto' or 'no' for plain prompts.")
        self.tokenizer = tokenizer
        self.uses_chat = has_template and chat != "no"
        self.opening = opening(tokenizer)

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def whole(self, parts: Parts) -> list[int]:
        """The prompt without filler, of whatever length it has."""
        before, after = self._sides(parts)
        return before + after

    def exact(self, parts: Parts, tokens: int) -> list[int]:
        """The prompt with exactly `tokens` tokens: the filler's first tokens stand between context and question.

        Raises:
            ValueError: the prompt alone is longer, or the filler too short.
        """
        before, after = self._sides(parts)
        missing = tokens - len(before) - len(after)
        if missing < 0:
            raise ValueError(f"the prompt has {len(before) + len(after)} tokens, {tokens} were asked for.")
        filler = self.ids(parts.filler)[:missing] if missing else []
        if len(filler) < missing:
            raise ValueError(f"{missing} tokens of filler are needed, there are {len(filler)}.")
        return before + filler + after

    def cut_in_the_middle(self, parts: Parts, tokens: int) -> list[int]:
        """At most `tokens` tokens: what is too long loses its middle, as LongBench and InfiniteBench cut theirs.

        The user's whole text is cut to its first and last halves; the chat frame and the answer prefix stay whole.
        """
        head, tail = self._frame(parts.chat)
        frame = self._opening(parts.chat) + (self.ids(head) if head else [])
        end = self.ids(tail + parts.answer_prefix)
        body = self.ids(parts.context + parts.question)
        room = tokens - len(frame) - len(end)
        if room < 2:
            raise ValueError(f"{tokens} tokens leave no room beside the {len(frame) + len(end)} of the chat frame.")
        if len(body) > room:
            body = body[: room // 2] + body[len(body) - (room - room // 2) :]
        return frame + body + end

    def _sides(self, parts: Parts) -> tuple[list[int], list[int]]:
        head, tail = self._frame(parts.chat)
        before = self._opening(parts.chat) + self.ids(head + parts.context)
        return before, self.ids(parts.question + tail + parts.answer_prefix)

    def _frame(self, chat: bool) -> tuple[str, str]:
        if not (chat and self.uses_chat):
            return "", ""
        turn = [{"role": "user", "content": MARK}]
        frame = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        head, _, tail = frame.partition(MARK)
        return head, tail

    def _opening(self, chat: bool) -> list[int]:
        """What the tokenizer puts before plain text; a chat template writes its own."""
        if chat and self.uses_chat:
            return []
        return self.opening


def opening(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text, such as its BOS; none for many."""
    bare = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    dressed = list(tokenizer("a")["input_ids"])
    for start in range(len(dressed) - len(bare) + 1):
        if dressed[start : start + len(bare)] == bare:
            return dressed[:start]
    return []


def digest(ids: list[int]) -> str:
    """sha256 of token ids, by which a resumed run knows that it asks the same question."""
    return hashlib.sha256(b"".join(i.to_bytes(4, "little") for i in ids)).hexdigest()
