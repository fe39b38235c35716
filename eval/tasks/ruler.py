"""RULER (arXiv 2404.06654): what its tasks share. Prompt formats, budgets and metrics are the benchmark's own.

A sample is made of haystack units: sentences, needles, words or documents. As many are taken as fit, and then the first
tokens of one unit more, so that prompt and generation budget have exactly the length asked for. The answer prefix
stands after the header of the assistant's turn.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..prompts import Parts
from ..running.fitting import largest
from .task import Item, Task


@dataclass(frozen=True)
class Question:
    """A prompt's parts, its references, and the needle's depth in the context (0.0 - 1.0) where it has one."""

    parts: Parts
    references: list[str]
    depth: float | None = None


class RulerTask(Task):
    """Base of RULER's tasks: `question` builds one with n units, this class chooses n.

    Attributes:
        least: the smallest number of units the task makes sense with.
    """

    suite = "ruler"
    metric = "string_match_all"
    least = 1

    def question(self, units: int, length: int, draw: random.Random, index: int) -> Question:
        """The question with `units` units of haystack; the same `draw` state must give the same needles."""
        raise NotImplementedError

    def most(self, length: int) -> int:
        """The largest number of units there can be in `length` tokens."""
        return max(self.least, length)

    def item(self, length: int, index: int) -> Item:
        prompter, tokens = self.setting.prompter, length - self.max_new_tokens
        seed = self.draw(length, index).random()

        def ask(units: int) -> Question:
            return self.question(units, length, random.Random(seed), index)

        def count(units: int) -> int:
            return len(prompter.whole(ask(units).parts))

        units = largest(count, tokens, self.least, self.most(length))
        if units is None:
            raise ValueError(
                f"{self.name} does not fit into --lengths {length}: {tokens} tokens remain beside the "
                f"{self.max_new_tokens} to generate, the smallest prompt has {count(self.least)}."
            )
        asked = ask(units)
        try:
            ids = prompter.exact(asked.parts, tokens)
        except ValueError as error:
            raise ValueError(f"{self.name} at --lengths {length}: {error}") from error
        return self.make(ids, length, index, references=asked.references, depth=asked.depth, parts=asked.parts)
