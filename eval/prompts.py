"""Prompts as token ids: the chat frame, the answer prefix after its header, and the exact length."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from hf_attn_plugins.hf.inputs.chat import Rendered, common, common_end, ids, opening, render

from .arguments import CHATS
from .running.fitting import largest

__all__ = ["CHATS", "Parts", "Prompter", "digest", "opening"]

logger = logging.getLogger("hf_attn_plugins")
NEIGHBOURS = 8  # cuts of the filler, in characters, that are tried beside the first before tokens are left out
BROKEN = "\N{REPLACEMENT CHARACTER}"  # what part of a character is decoded to


@dataclass(frozen=True)
class Parts:
    """One question, before it is cut to a length.

    Attributes:
        context: everything up to the end of the haystack, instructions before it included.
        question: what follows the haystack in the user's turn.
        answer_prefix: how the answer begins; it stands after the header of the assistant's turn.
        filler: haystack without an answer in it, whose beginning fills the context up to the exact length.
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
    in front (a BOS, where it has one), context, question, answer prefix. Token ids are those of the whole text.

    Args:
        chat: "auto" (the template where there is one), "yes" or "no".
        template_args: further variables of the template, such as {"enable_thinking": False}.

    Raises:
        ValueError: chat="yes" for a tokenizer without a template, or template_args that no template would read.
    """

    def __init__(self, tokenizer: Any, chat: str = "auto", template_args: Mapping[str, Any] | None = None) -> None:
        if chat not in CHATS:
            raise ValueError(f"chat={chat!r} is unknown: choose one of {', '.join(CHATS)}.")
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if chat == "yes" and not has_template:
            raise ValueError("this tokenizer has no chat template: use chat 'auto' or 'no' for plain prompts.")
        self.tokenizer = tokenizer
        self.uses_chat = has_template and chat != "no"
        self.template_args = dict(template_args or {})
        if self.template_args and not self.uses_chat:
            raise ValueError(
                f"--template-arg {', '.join(self.template_args)}: no chat template is used "
                f"({'--chat no' if has_template else 'the tokenizer has none'}), leave it out."
            )
        self.opening = opening(tokenizer)
        self._warned = False

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, nothing added."""
        return ids(self.tokenizer, text)

    def text(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False)

    def whole(self, parts: Parts) -> list[int]:
        """The prompt without filler, of whatever length it has.

        Raises:
            ValueError: the chat template does not show context and question exactly once.
        """
        frame = self._frame(parts)
        return self._tokens(parts, frame.text + parts.answer_prefix)

    def exact(self, parts: Parts, tokens: int) -> list[int]:
        """The prompt with exactly `tokens` tokens: the beginning of the filler stands between context and question.

        The filler is cut after the character that gives the length. Where no cut does, tokens of the filler's end are
        left out of those of a slightly longer text.

        Raises:
            ValueError: the prompt alone is longer, or the filler too short.
        """
        bare = self.whole(parts)
        missing = tokens - len(bare)
        if missing < 0:
            raise ValueError(f"the prompt has {len(bare)} tokens, {tokens} were asked for.")
        if not missing:
            return bare
        known: dict[int, list[int]] = {}

        def with_filler(characters: int) -> list[int]:
            if characters not in known:
                known[characters] = self.whole(replace(parts, context=parts.context + parts.filler[:characters]))
            return known[characters]

        most = self._enough(parts.filler, missing)
        if len(with_filler(most)) < tokens:
            there = len(with_filler(most)) - len(bare)
            raise ValueError(f"{missing} tokens of filler are needed, there are {there}.")
        cut = largest(lambda n: len(with_filler(n)), tokens, 0, most) or 0
        for characters in sorted(
            range(max(0, cut - NEIGHBOURS), min(most, cut + NEIGHBOURS) + 1), key=lambda n: abs(n - cut)
        ):
            if len(with_filler(characters)) == tokens:
                return with_filler(characters)
        longer = min((found for found in known.values() if len(found) > tokens), key=len)
        return _without_middle(bare, longer, tokens)

    def cut_in_the_middle(self, parts: Parts, tokens: int) -> list[int]:
        """At most `tokens` tokens: what is too long loses its middle, as LongBench and InfiniteBench cut theirs.

        Of the tokens of the whole text, the user's are cut to their first and last halves; the chat frame and the
        answer prefix stay whole, and so do characters of several tokens at the cut.
        """
        frame = self._frame(parts)
        whole = self._tokens(parts, frame.text + parts.answer_prefix)
        start = common([whole, self._tokens(parts, frame.before)])
        end = common_end(whole[start:], self.ids(frame.after + parts.answer_prefix))
        room = tokens - start - end
        if room < 2:
            raise ValueError(f"{tokens} tokens leave no room beside the {start + end} of the chat frame.")
        if len(whole) <= tokens:
            return whole
        first, last = start + room // 2, len(whole) - end - (room - room // 2)
        for _ in range(3):  # a character has four tokens at most
            first -= self.text(whole[max(start, first - 8) : first]).endswith(BROKEN)
            last += self.text(whole[last : last + 8]).startswith(BROKEN)
        return whole[:first] + whole[last:]

    def answer_ids(self, parts: Parts, answer: str) -> list[int]:
        """The tokens with which an answer goes on behind the prompt: those of the whole text, the prompt's left out.

        Behind an answer prefix, or behind plain text, a space stands before the answer unless white space does already.
        """
        tail = (self._frame(parts).text + parts.answer_prefix)[-200:]
        goes_on = bool(parts.answer_prefix) or not (parts.chat and self.uses_chat)
        spaced = f" {answer}" if goes_on and tail and not tail[-1].isspace() else answer
        before = self.ids(tail)
        joined = self.ids(tail + spaced)
        if joined[: len(before)] == before:
            return joined[len(before) :]
        # The last piece of the prompt would be longer with the answer behind it, and the prompt's tokens stand.
        line = self.ids("\n")
        alone = self.ids("\n" + answer.lstrip())
        return alone[len(line) :] if alone[: len(line)] == line else self.ids(answer.lstrip())

    def _tokens(self, parts: Parts, text: str) -> list[int]:
        """Tokens of a text with what the tokenizer puts before it; a chat template writes its own."""
        if parts.chat and self.uses_chat:
            return self.ids(text)
        return self.opening + self.ids(text)

    def _frame(self, parts: Parts) -> Rendered:
        message = parts.context + parts.question
        if not (parts.chat and self.uses_chat):
            return Rendered("", message, "")
        found = render(self.tokenizer, message, arguments=self.template_args)
        if parts.answer_prefix and found.open_thought and not self._warned:
            self._warned = True
            logger.warning(
                "the chat template leaves %s open before the answer, so that answers begin inside the model's "
                "reasoning: pass --template-arg enable_thinking=false if the template knows it, or --chat no.",
                found.open_thought,
            )
        return found

    def _enough(self, filler: str, missing: int) -> int:
        """Characters of the filler that have clearly more tokens than are missing, by powers of two; at most all."""
        characters = 4 * missing + 64
        while characters < len(filler) and len(self.ids(filler[:characters])) < missing + 16:
            characters *= 2
        return min(characters, len(filler))


def _without_middle(short: list[int], long: list[int], tokens: int) -> list[int]:
    """`long` with exactly `tokens` tokens: some are left out before the end that it has in common with `short`."""
    start = common([short, long])
    end = min(common_end(short, long), len(short) - start)
    surplus = len(long) - tokens
    if surplus > len(long) - start - end:
        raise ValueError(f"no cut of the filler gives {tokens} tokens: choose another length.")
    return long[: len(long) - end - surplus] + long[len(long) - end :]


def digest(token_ids: list[int]) -> str:
    """sha256 of token ids, by which a resumed run knows that it asks the same question."""
    return hashlib.sha256(b"".join(i.to_bytes(4, "little") for i in token_ids)).hexdigest()
