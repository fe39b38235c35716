"""What every task hands to the runner."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from ..prompts import Parts, Prompter, digest
from ..records import PROMPT_TAIL, Sample


@dataclass(frozen=True)
class Item:
    """One sample with its prompt's token ids.

    Attributes:
        arguments: what the metric needs beside answer and references.
        stop: what ends an answer that has begun, such as a line's end; "" for nothing.
        answer_ids: the tokens of the reference answer behind the prompt, whose likelihood is measured; none where the
            sample has no reference.
    """

    sample: Sample
    ids: list[int]
    arguments: dict[str, Any] = field(default_factory=dict)
    stop: str = ""
    answer_ids: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Setting:
    """What tasks need to know of a run: how prompts are made, seeds, and where texts and data sets are.

    `text_tokens` is how many tokens of a text the run reads at most, None for all: a longer one is not tokenised whole.
    """

    prompter: Prompter
    seed: int = 42
    max_new_tokens: int | None = None
    decode_tokens: int = 32
    text: str | None = None
    haystack: str | None = None
    data: dict[str, str] = field(default_factory=dict)
    online: bool = False
    text_tokens: int | None = None


class Task:
    """One task of a suite: `item(length, index)` gives the same sample in every process and every run.

    Attributes:
        kind: "generation", "loss", "agreement" or "speed": which measurement the runner makes.
        metric: name of a function in `metrics.METRICS`.
        max_new_tokens: generation budget of the benchmark.
    """

    suite = ""
    kind = "generation"
    metric = ""
    max_new_tokens = 0

    def __init__(self, name: str, setting: Setting) -> None:
        self.name, self.setting = name, setting
        if setting.max_new_tokens is not None and self.kind == "generation":
            self.max_new_tokens = setting.max_new_tokens

    @property
    def title(self) -> str:
        """The name in the results, which differs where the data is not the benchmark's own."""
        return self.name

    def available(self, length: int) -> int | None:
        """Samples there are at a length, None for as many as asked for."""
        return None

    def item(self, length: int, index: int) -> Item:
        """Sample number `index` at `length` tokens.

        Raises:
            ValueError: the task cannot be asked at that length.
        """
        raise NotImplementedError

    def reference_answer(self, references: list[str]) -> str:
        """The answer whose likelihood is measured: all references where all are wanted, else the first."""
        return ", ".join(references) if self.metric == "string_match_all" else "".join(references[:1])

    def draw(self, length: int, index: int) -> random.Random:
        """The sample's own random numbers: adding samples, lengths or tasks changes no other sample."""
        return random.Random(f"{self.setting.seed} {self.suite} {self.name} {length} {index}")

    def sample_id(self, length: int, index: int) -> str:
        return f"{self.suite}/{self.title}/{length}/{index:04d}"

    def make(
        self,
        ids: list[int],
        length: int,
        index: int,
        *,
        references: list[str] | None = None,
        depth: float | None = None,
        arguments: dict[str, Any] | None = None,
        stop: str = "",
        parts: Parts | None = None,
    ) -> Item:
        """An item from finished token ids; with the `parts` of its prompt, its reference answer in tokens as well."""
        answer = self.reference_answer(references or [])
        answer_ids = self.setting.prompter.answer_ids(parts, answer) if parts is not None and answer else []
        sample = Sample(
            sample=self.sample_id(length, index),
            task=self.title,
            suite=self.suite,
            length=length,
            tokens=len(ids),
            depth=depth,
            references=references or [],
            prompt_tail=self.setting.prompter.text(ids[-PROMPT_TAIL:])[-PROMPT_TAIL:],
            metric=self.metric,
            max_new_tokens=self.max_new_tokens,
            digest=digest(ids),
        )
        return Item(sample, ids, arguments or {}, stop, answer_ids[: self.max_new_tokens])
