"""RULER's question answering: the documents of a question among others (qa_1: SQuAD, qa_2: HotpotQA)."""

from __future__ import annotations

import random

from ..prompts import Parts
from .haystacks import documents_for
from .ruler import Question, RulerTask
from .task import Setting

FORMATS = {"qa_1": "squad", "qa_2": "hotpotqa"}


class QuestionAnswering(RulerTask):
    """qa_1 or qa_2: right where any of the references stands in the answer."""

    metric = "string_match_part"
    max_new_tokens = 32
    TASK = (
        "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    )
    BEFORE = f"{TASK}\n\nThe following are given documents.\n\n"
    AFTER = f"\n\n{TASK}\n\nQuestion: "
    PREFIX = " Answer:"

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        self.data = documents_for(setting, name, FORMATS[name])
        self.least = max(len(asked.own) for asked in self.data.questions)

    @property
    def title(self) -> str:
        return self.name + self.data.suffix

    def available(self, length: int) -> int | None:
        return len(self.data.questions)

    def question(self, units: int, length: int, draw: random.Random, index: int) -> Question:
        documents, asked = self.data.documents, self.data.questions[index]
        near, own = list(asked.near), {*asked.own, *asked.near}
        others = [i for i in range(len(documents)) if i not in own]
        draw.shuffle(near)
        draw.shuffle(others)
        others = near + others  # RULER takes the rest of the same article first
        wanted = max(0, units - len(asked.own))
        rounds = -(-(wanted + 2) // len(others)) if others else 0
        others = others * rounds
        ranks = [draw.random() for _ in range(len(asked.own) + len(others))]
        chosen = [*asked.own, *others[:wanted]]
        order = sorted(range(len(chosen)), key=lambda i: ranks[i])
        shown = [f"Document {n}:\n{documents[chosen[i]]}" for n, i in enumerate(order, 1)]
        more = [
            f"\n\nDocument {n}:\n{documents[i]}" for n, i in enumerate(others[wanted : wanted + 2], len(chosen) + 1)
        ]
        parts = Parts(self.BEFORE + "\n\n".join(shown), self.AFTER + asked.question, self.PREFIX, "".join(more))
        return Question(parts, list(asked.answers))
