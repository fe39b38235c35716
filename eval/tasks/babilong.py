"""BABILong (arXiv 2406.10149): bAbI's facts hidden in books, at the lengths the data set was made for, never cut."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..prompts import Parts
from .rows import FORMATS, load
from .task import Item, Setting, Task

HUB_ID = "RMT-team/babilong-1k-samples"


@functools.cache
def formats() -> dict[str, dict[str, Any]]:
    """qa1 - qa5, data of the benchmark (babilong/prompts.py, metrics.py): instruction, examples, labels."""
    return json.loads(files(__package__).joinpath("babilong.json").read_text(encoding="utf-8"))


class BabiLong(Task):
    """One of BABILong's first five tasks; `length` chooses the data set's own configuration ("4k" for 4096)."""

    suite = "babilong"
    metric = "label_match"
    max_new_tokens = 20

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        self.format = formats()[name]
        self._rows: dict[int, Sequence[Mapping[str, Any]]] = {}

    def rows(self, length: int) -> Sequence[Mapping[str, Any]]:
        """The rows made for a length.

        Raises:
            ValueError: a length the data set has no configuration for.
        """
        if length not in self._rows:
            if length % 1024:
                raise ValueError(f"babilong has no prompts for --lengths {length}: choose 1024, 2048, 4096, ...")
            config = "1M" if length == 2**20 else f"{length // 1024}k"
            source = self.setting.data.get(self.suite, HUB_ID)
            self._rows[length] = load(
                "babilong",
                str(_file(Path(source), self.name, config)) if Path(source).is_dir() else source,
                name=config,
                split=self.name,
                fields=("input", "question", "target"),
                online=self.setting.online,
            )
        return self._rows[length]

    def available(self, length: int) -> int | None:
        return len(self.rows(length))

    def item(self, length: int, index: int) -> Item:
        row, form = self.rows(length)[index], self.format
        before = f"{form['instruction']}\n{form['examples']}\n{form['post_prompt']}\n<context>\n"
        parts = Parts(before + row["input"], f"\n</context>\nQuestion: {row['question']}".rstrip())
        arguments = {"labels": form["labels"], "question": row["question"]}
        ids = self.setting.prompter.whole(parts)
        return self.make(ids, length, index, references=[row["target"]], arguments=arguments, parts=parts)


def _file(folder: Path, task: str, config: str) -> Path:
    """qa1/4k.json or 4k/qa1.json, in any format and at any depth."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in FORMATS and {path.stem, path.parent.name} == {task, config}:
            return path
    raise ValueError(f"babilong: neither {task}/{config}.json nor {config}/{task}.json is in {folder}.")
