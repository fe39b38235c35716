"""How an answer is scored: every metric takes (prediction, references, **arguments) and gives 0.0 - 1.0.

Sources: RULER (scripts/eval/synthetic/constants.py), LongBench (metrics.py, eval.py), LongBench-v2, BABILong
(babilong/metrics.py); the metrics of InfiniteBench are in `infinite_metrics`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from typing import Any

from . import infinite_metrics
from .normalisation import f1, normalised, normalised_chinese


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """RULER, all tasks but QA: the share of references that stand in the answer, whatever their case."""
    answer = prediction.lower()
    return sum(reference.lower() in answer for reference in references) / max(1, len(references))


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """RULER's QA: 1 where any reference stands in the answer."""
    answer = prediction.lower()
    return float(any(reference.lower() in answer for reference in references))


def qa_f1(prediction: str, references: Sequence[str]) -> float:
    """LongBench: the best word F1 over the references."""
    answer = normalised(prediction)
    return max((f1(answer, normalised(reference)) for reference in references), default=0.0)


def qa_f1_zh(prediction: str, references: Sequence[str]) -> float:
    """LongBench's F1 for Chinese, over jieba's words."""

    def words(text: str) -> list[str]:
        return [word for word in map(normalised_chinese, segmented(text)) if word]

    return max((f1(words(prediction), words(reference)) for reference in references), default=0.0)


def rouge(prediction: str, references: Sequence[str]) -> float:
    """LongBench: the best ROUGE-L over the references."""
    return max((rouge_l(prediction, reference) for reference in references), default=0.0)


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of ROUGE-L by the package that LongBench's script uses; 0 where a text has no words.

    Raises:
        ImportError: rouge is not installed.
    """
    try:
        from rouge import Rouge
    except ImportError as error:
        raise ImportError("LongBench's ROUGE-L needs the package rouge: pip install rouge.") from error
    try:
        return Rouge().get_scores([prediction], [reference], avg=True)["rouge-l"]["f"]
    except ValueError:  # an empty text
        return 0.0


def rouge_zh(prediction: str, references: Sequence[str]) -> float:
    """LongBench's ROUGE-L for Chinese, over jieba's words."""
    answer = " ".join(segmented(prediction))
    return max((rouge_l(answer, " ".join(segmented(reference))) for reference in references), default=0.0)


def segmented(text: str) -> list[str]:
    """Chinese words.

    Raises:
        ImportError: jieba is not installed.
    """
    try:
        import jieba
    except ImportError as error:
        raise ImportError("the Chinese tasks of LongBench need the package jieba: pip install jieba.") from error
    return list(jieba.cut(text, cut_all=False))


def classification(prediction: str, references: Sequence[str], all_classes: Sequence[str] = ()) -> float:
    """LongBench: 1 / n where the answer names n classes and the right one is among them, else 0.

    A class whose name is part of the right one's does not count.
    """

    def score(reference: str) -> float:
        named = [c for c in all_classes if c in prediction and (c == reference or c not in reference)]
        return 1.0 / len(named) if reference in named else 0.0

    return max(map(score, references), default=0.0)


def count_score(prediction: str, references: Sequence[str]) -> float:
    """LongBench's passage_count: the share of the answer's numbers that are right."""
    numbers = re.findall(r"\d+", prediction)
    return max((numbers.count(reference) / len(numbers) for reference in references), default=0.0) if numbers else 0.0


def retrieval_score(prediction: str, references: Sequence[str]) -> float:
    """LongBench's passage_retrieval: as `count_score`, for the number in "Paragraph 7" (or its Chinese form)."""
    return count_score(prediction, [number for reference in references for number in re.findall(r"\d+", reference)[:1]])


def code_similarity(prediction: str, references: Sequence[str]) -> float:
    """LongBench's code tasks: edit similarity of the first line that is neither comment nor fence, in whole percent."""
    lines = (line for line in prediction.split("\n") if line.strip())
    line = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")

    def ratio(reference: str) -> float:
        if not line or not reference:
            return 0.0
        return round(100 * SequenceMatcher(None, line, reference).ratio()) / 100

    return max(map(ratio, references), default=0.0)


def choice_letter(prediction: str, references: Sequence[str]) -> float:
    """LongBench-v2: the letter after "The correct answer is", with or without brackets."""
    text = prediction.replace("*", "")
    found = re.search(r"The correct answer is \(([A-D])\)", text) or re.search(r"The correct answer is ([A-D])", text)
    return float(found is not None and found.group(1) in references)


def label_match(prediction: str, references: Sequence[str], labels: Sequence[str] = (), question: str = "") -> float:
    """BABILong: the reference is the only one of the task's labels in the answer's first sentence.

    Labels that stand in the question do not count.
    """
    answer = prediction.lower().split(".")[0]
    for mark in ("<context>", "<example>", "question"):
        answer = answer.split(mark)[0]
    known = {label.lower() for label in labels}
    named = {label for label in known if label in answer and label not in question.lower()}
    return float(any(named == {reference.lower()} for reference in references))


METRICS: dict[str, Callable[..., float]] = {
    function.__name__: function
    for function in (
        string_match_all,
        string_match_part,
        qa_f1,
        qa_f1_zh,
        rouge,
        rouge_zh,
        classification,
        count_score,
        retrieval_score,
        code_similarity,
        choice_letter,
        label_match,
        *infinite_metrics.ALL,
    )
}


def score(metric: str, prediction: str, references: Sequence[str], **arguments: Any) -> float:
    """The score of one answer by the metric called `metric`."""
    return METRICS[metric](prediction, references, **arguments)
