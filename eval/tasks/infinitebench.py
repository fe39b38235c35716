"""InfiniteBench (arXiv 2402.13718): twelve tasks over contexts of 100k tokens, cut in the middle where they are longer.

With a chat template the prompts are those the benchmark gives to chat models, without one those for base models.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from ..prompts import Parts
from .longbench import DatasetTask
from .rows import load
from .task import Setting

HUB_ID = "xinrongzhang2022/InfiniteBench"
# The hub's files hold answers of several types: all are read as lists of text.
FEATURES = {"id": "int64", "context": "string", "input": "string", "answer": "strings", "options": "strings"}
WITH_OPTIONS = {"longbook_choice_eng", "code_debug"}


@functools.cache
def formats() -> dict[str, dict[str, Any]]:
    """The tasks by name, data of the benchmark (src/prompt.py, src/eval_utils.py): prompts, budget, metric."""
    return json.loads(files(__package__).joinpath("infinitebench.json").read_text(encoding="utf-8"))


class InfiniteBench(DatasetTask):
    """One of InfiniteBench's twelve tasks."""

    suite = "infinitebench"

    def __init__(self, name: str, setting: Setting) -> None:
        self.format = formats()[name]
        self.max_new_tokens, self.metric = self.format["max_new_tokens"], self.format["metric"]
        super().__init__(name, setting)

    def read(self) -> Sequence[Mapping[str, Any]]:
        fields = ["context", "input", "answer", *(["options"] if self.name in WITH_OPTIONS else [])]
        source, online = self.setting.data.get(self.suite, HUB_ID), self.setting.online
        return load(
            "infinitebench", source, self.name, split=self.name, fields=fields, features=FEATURES, online=online
        )

    def parts(self, row: Mapping[str, Any]) -> Parts:
        prompt = self.format["chat" if self.setting.prompter.uses_chat else "plain"]
        before, _, after = prompt.partition("{context}")
        names = self._names(row)
        return Parts(before.format(**names) + row["context"], after.format(**names))

    def references(self, row: Mapping[str, Any]) -> list[str]:
        answer = row["answer"]
        found = [str(value) for value in answer] if isinstance(answer, list) else [str(answer)]
        if self.name in WITH_OPTIONS and len(found) == 1:
            found.append("ABCD"[list(row["options"]).index(found[0])])
        return found

    def _names(self, row: Mapping[str, Any]) -> dict[str, str]:
        names = {"input": row["input"], "prefix": "", "func": "", "call": ""}
        if self.name in WITH_OPTIONS:
            names |= dict(zip("ABCD", row["options"], strict=True))
        if self.name == "math_find":
            target = re.search(r"The .+(?= of)", row["input"]) or re.search(r"The \w+ number", row["input"])
            names["prefix"] = f"What is {target.group().lower()} in the following list?" if target else row["input"]
        if self.name == "code_run":
            call = re.search(r"(func_[0-9]+)\(-?[0-9]+\)", row["input"])
            if call is None:
                raise ValueError(f"infinitebench: no call of a function in {row['input']!r}.")
            names |= {"func": call.group(1), "call": call.group()}
        return names
