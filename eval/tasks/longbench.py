"""LongBench (arXiv 2308.14508) and LongBench-v2 (arXiv 2412.15204): formats, budgets, truncation and metrics as theirs.

Prompts longer than the length asked for lose their middle. Six few-shot and code tasks of LongBench go without the chat
template, and of four of them only the answer's first line counts.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from ..prompts import Parts
from .rows import load
from .task import Item, Setting, Task

HUB_ID, HUB_ID_V2 = "zai-org/LongBench", "zai-org/LongBench-v2"  # THUDM/... until the organisation's name changed
ARCHIVE = "data.zip"  # LongBench's files; the script beside them is not run by `datasets` from version 4 on
WITHOUT_CHAT = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}


@dataclass(frozen=True)
class Format:
    """A row of longbench.json: the prompt with {context} and {input}, tokens to generate, metric."""

    prompt: str
    max_new_tokens: int
    metric: str


@functools.cache
def formats() -> dict[str, Format]:
    """LongBench's tasks by name, data of the benchmark (config/dataset2prompt.json, dataset2maxlen.json, eval.py)."""
    rows = json.loads(files(__package__).joinpath("longbench.json").read_text(encoding="utf-8"))
    return {name: Format(**row) for name, row in rows.items()}


class DatasetTask(Task):
    """Base of tasks whose samples are rows of a data set: `parts` and `references` say how a row is asked."""

    fields: tuple[str, ...] = ("context", "input")

    @functools.cached_property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        return self.read()

    def read(self) -> Sequence[Mapping[str, Any]]:
        """Load the rows."""
        raise NotImplementedError

    def source(self, default: str) -> str:
        return self.setting.data.get(self.suite, default)

    def available(self, length: int) -> int | None:
        return len(self.rows)

    def parts(self, row: Mapping[str, Any]) -> Parts:
        raise NotImplementedError

    def references(self, row: Mapping[str, Any]) -> list[str]:
        raise NotImplementedError

    def arguments(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What the metric needs beside the references."""
        return {}

    def item(self, length: int, index: int) -> Item:
        row = self.rows[index]
        parts = self.parts(row)
        ids = self.setting.prompter.cut_in_the_middle(parts, length - self.max_new_tokens)
        return self.make(
            ids, length, index, references=self.references(row), arguments=self.arguments(row), parts=parts
        )


class LongBench(DatasetTask):
    """One of LongBench's 21 tasks, or its "_e" form with evenly spread lengths."""

    suite = "longbench"
    fields = ("context", "input", "answers")

    def __init__(self, name: str, setting: Setting) -> None:
        self.base = name.removesuffix("_e")
        self.format = formats()[self.base]
        self.max_new_tokens, self.metric = self.format.max_new_tokens, self.format.metric
        super().__init__(name, setting)

    def read(self) -> Sequence[Mapping[str, Any]]:
        source, classes = self.source(HUB_ID), ("all_classes",) if self.metric == "classification" else ()
        online, fields = self.setting.online, (*self.fields, *classes)
        archive = (HUB_ID, ARCHIVE, f"data/{self.name}.jsonl")
        return load("longbench", source, self.name, name=self.name, fields=fields, archive=archive, online=online)

    def parts(self, row: Mapping[str, Any]) -> Parts:
        before, _, after = self.format.prompt.partition("{context}")
        after = after.replace("{input}", row["input"])
        return Parts(before + row["context"], after, chat=self.base not in WITHOUT_CHAT)

    def references(self, row: Mapping[str, Any]) -> list[str]:
        return list(row["answers"])

    def arguments(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {"all_classes": list(row["all_classes"])} if self.metric == "classification" else {}

    def item(self, length: int, index: int) -> Item:
        item = super().item(length, index)
        return dataclasses.replace(item, stop="\n") if self.base in FIRST_LINE else item


class LongBenchV2(DatasetTask):
    """LongBench-v2: multiple choice, answered as "The correct answer is (A)"."""

    suite = "longbench_v2"
    metric = "choice_letter"
    max_new_tokens = 128
    fields = ("context", "question", "choice_A", "choice_B", "choice_C", "choice_D", "answer")
    AFTER = (
        "\n</text>\n\nWhat is the correct answer to this question: {question}\nChoices:\n(A) {A}\n(B) {B}\n(C) {C}\n"
        '(D) {D}\n\nFormat your response as follows: "The correct answer is (insert answer here)".'
    )

    def read(self) -> Sequence[Mapping[str, Any]]:
        source = self.source(HUB_ID_V2)
        return load("longbench_v2", source, split="train", fields=self.fields, online=self.setting.online)

    def parts(self, row: Mapping[str, Any]) -> Parts:
        before = "Please read the following text and answer the question below.\n\n<text>\n"
        choices = {letter: row[f"choice_{letter}"].strip() for letter in "ABCD"}
        after = self.AFTER.format(question=row["question"].strip(), **choices)
        return Parts(before + row["context"].strip(), after)

    def references(self, row: Mapping[str, Any]) -> list[str]:
        return [row["answer"]]

    def reference_answer(self, references: list[str]) -> str:
        return f"The correct answer is ({references[0]})"
