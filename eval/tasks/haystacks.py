"""Texts and question-answer sets named by --haystack: a file, a folder or name that `datasets` loads, or "pydoc".

RULER's own files (PaulGrahamEssays.json, squad.json, hotpotqa.json) give the benchmark's tasks under their own names.
With anything else a task carries the source in its name, because its figures cannot be compared with published ones.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_attn_plugins.hf.inputs.texts import read_text

from .paths import split_paths
from .rows import load
from .task import Setting

PYDOC = "pydoc"  # the language reference that Python itself carries
RULERS_OWN = {"PaulGrahamEssays", "squad", "hotpotqa"}
LONGEST = 60  # words of a sentence; tables and code have no full stops
LONGEST_WORD = 400  # characters
STOPS = "。！？｡"
WORD = re.compile(rf"[^\s{STOPS}]{{1,{LONGEST_WORD}}}[{STOPS}]?|[{STOPS}]")


@dataclass(frozen=True)
class Essay:
    """Sentences to hide needles between, repeated where more are asked for than there are.

    Sentences are cut from the text as they are asked for: of a very long text only the beginning is looked at.
    """

    source: str
    text: str

    @functools.cached_property
    def _cut(self) -> tuple[list[str], Iterator[str]]:
        return [], _sentences(self.text)

    @property
    def suffix(self) -> str:
        return _suffix(self.source)

    def sentences(self, count: int) -> list[str]:
        """The first `count` sentences of the essay, over and over."""
        known, more = self._cut
        known.extend(itertools.islice(more, max(0, count - len(known))))
        rounds = -(-count // len(known))
        return (known * rounds)[:count] if rounds > 1 else known[:count]


@dataclass(frozen=True)
class Asked:
    """One question with the indices of its own documents, and of others on its subject."""

    question: str
    answers: tuple[str, ...]
    own: tuple[int, ...]
    near: tuple[int, ...] = ()


@dataclass(frozen=True)
class Documents:
    """Documents and the questions about them; `kind` is "squad" or "hotpotqa", after the format."""

    source: str
    kind: str
    documents: tuple[str, ...]
    questions: tuple[Asked, ...]

    @property
    def suffix(self) -> str:
        return _suffix(self.source)


def essay_for(setting: Setting, task: str) -> Essay:
    """The essay among the run's haystacks.

    Raises:
        ValueError: there is none; the message says what to give.
    """
    for source in sources(setting.haystack):
        found = read(source, setting.online)
        if isinstance(found, Essay):
            return found
    raise ValueError(
        f"{task} hides its needles in an essay: give --haystack FILE (text, or JSON such as RULER's "
        f"PaulGrahamEssays.json), a datasets name, or {PYDOC} for Python's own documentation."
    )


def documents_for(setting: Setting, task: str, kind: str) -> Documents:
    """The documents of a format among the run's haystacks.

    Raises:
        ValueError: there are none; the message says what to give.
    """
    for source in sources(setting.haystack):
        found = read(source, setting.online)
        if isinstance(found, Documents) and found.kind == kind:
            return found
    raise ValueError(
        f"{task} asks about documents: give --haystack FILE in the format of {kind}.json, or a datasets name."
    )


def sources(haystack: str | None) -> list[str]:
    """The haystacks of a run, which are given with commas between them; a path that exists may hold commas itself."""
    return split_paths(haystack or "")


@functools.cache
def read(source: str, online: bool) -> Essay | Documents:
    """The haystack behind a name.

    Raises:
        ValueError: nothing that can be read, or without text or questions in it.
    """
    path = Path(source)
    if source == PYDOC:
        from pydoc_data.topics import topics

        found: Any = "\n".join(topics.values())
    elif path.is_file() and path.suffix == ".json":
        found = _json(path)
    elif path.is_file() and path.suffix not in (".jsonl", ".parquet", ".csv"):
        found = _text(path)
    else:
        found = load("haystack", source, online=online)
    name = source if source == PYDOC else path.stem
    if isinstance(found, Mapping) and isinstance(found.get("text"), str):
        found = found["text"]
    if isinstance(found, str):
        return _essay(name, found, source)
    rows = found.get("data", ()) if isinstance(found, Mapping) else found
    if not hasattr(rows, "__getitem__") or not len(rows) or not isinstance(rows[0], Mapping):
        raise ValueError(f"--haystack {source}: neither a text nor questions over documents are in it.")
    first = rows[0]
    if "paragraphs" in first:
        return _squad(name, [entry["paragraphs"] for entry in rows])
    if "question" in first and "context" in first:
        return _rows(name, source, rows)
    if isinstance(first.get("text"), str):
        whole = "\n".join(row["text"] for row in rows)
        return _essay(name, whole, source)
    raise ValueError(
        f"--haystack {source}: fields {', '.join(first)}; needed are text, or question, context and answers."
    )


def _suffix(source: str) -> str:
    return "" if source in RULERS_OWN else "_" + re.sub(r"\W+", "_", source.lower()).strip("_")


def _json(path: Path) -> Any:
    try:
        return json.loads(_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"--haystack {path}: no JSON ({error}).") from error


def _text(path: Path) -> str:
    return read_text(path)


def _essay(name: str, text: str, source: str) -> Essay:
    if not re.search(r"\S", text):
        raise ValueError(f"--haystack {source}: there is no text in it.")
    return Essay(name, text)


def _sentences(text: str) -> Iterator[str]:
    """Sentences of at most `LONGEST` words, one space between words, one at a time: the text is never copied whole.

    Scripts that put no spaces between words are cut at their full stops, and at `LONGEST_WORD` characters without one.
    """
    words: list[str] = []
    for found in WORD.finditer(text):
        words.append(found.group())
        if words[-1][-1] in ".!?" + STOPS or len(words) == LONGEST or len(words[-1]) >= LONGEST_WORD:
            yield " ".join(words)
            words = []
    if words:
        yield " ".join(words)


def _squad(name: str, articles: Sequence[Sequence[Mapping[str, Any]]]) -> Documents:
    documents = sorted({p["context"] for article in articles for p in article})
    place = {text: i for i, text in enumerate(documents)}
    questions = []
    for article in articles:
        whole = {place[p["context"]] for p in article}
        for p in article:
            own = place[p["context"]]
            near = tuple(sorted(whole - {own}))
            for qa in p["qas"]:
                if not qa.get("is_impossible") and qa["answers"]:
                    questions.append(Asked(qa["question"], tuple(a["text"] for a in qa["answers"]), (own,), near))
    return _documents(name, "squad", documents, questions)


def _rows(name: str, source: str, rows: Sequence[Mapping[str, Any]]) -> Documents:
    """Rows with a question each: SQuAD's columns as `datasets` has them, or HotpotQA's in either of its forms."""
    kind = "squad" if isinstance(rows[0]["context"], str) else "hotpotqa"
    texts = [_contexts(row["context"]) for row in rows]
    documents = sorted({text for row in texts for text in row})
    place = {text: i for i, text in enumerate(documents)}
    questions = []
    for number, (row, own) in enumerate(zip(rows, texts, strict=True)):
        answers = row.get("answers", row.get("answer"))
        if answers is None:
            raise ValueError(f"--haystack {source}, row {number}: the field answers (or answer) is missing.")
        if isinstance(answers, Mapping):
            answers = answers["text"]
        answers = [answers] if isinstance(answers, str) else answers
        if answers:
            questions.append(Asked(row["question"], tuple(answers), tuple(place[text] for text in own)))
    return _documents(name, kind, documents, questions)


def _contexts(context: Any) -> list[str]:
    if isinstance(context, str):
        return [context]
    pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, Mapping) else context
    return [f"{title}\n{''.join(sentences)}" for title, sentences in pairs]


def _documents(name: str, kind: str, documents: list[str], questions: list[Asked]) -> Documents:
    if not questions:
        raise ValueError(f"--haystack {name}: no question in it has an answer.")
    return Documents(name, kind, tuple(documents), tuple(questions))
