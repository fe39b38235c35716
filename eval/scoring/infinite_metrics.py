"""The metrics of InfiniteBench (src/compute_scores.py), each (prediction, references) -> 0.0 - 1.0."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .normalisation import f1, normalised_chinese

ANSWERS = ("answer is:", "answer:", "answer is", "option is")


def first_number(prediction: str, references: Sequence[str]) -> float:
    """passkey, number_string: the first run of digits."""
    found = re.search(r"[0-9]+", prediction)
    return float(found is not None and found.group() in references)


def kv_match(prediction: str, references: Sequence[str]) -> float:
    """kv_retrieval: the value is one of the words."""
    words = _spaced(prediction, "\n:\"'.,?!{}").split()
    return float(any(reference in words for reference in references))


def name_match(prediction: str, references: Sequence[str]) -> float:
    """longdialogue_qa_eng: the (first) name is one of the words, in capitals."""
    words = _spaced(prediction, "\n:\"'.,?!{}").upper().split()
    return float(bool(references) and references[0].upper() in words)


def last_number(prediction: str, references: Sequence[str]) -> float:
    """code_run: the last word is the number."""
    words = _spaced(prediction.strip(), "\n.`'\":").split()
    try:
        return float(bool(words) and int(words[-1]) in [int(reference) for reference in references])
    except ValueError:
        return 0.0


def math_number(prediction: str, references: Sequence[str]) -> float:
    """math_find: the first number, whole or decimal, equals the reference."""
    found = re.search(r"\d+\.\d+|\d+", prediction)
    return float(found is not None and any(float(found.group()) == float(reference) for reference in references))


def option_letter(prediction: str, references: Sequence[str]) -> float:
    """longbook_choice_eng: the letter at the start, after an "answer is", or standing alone first."""
    if prediction[:1] in set("ABCD"):
        return float(prediction[0] in references)
    text = re.sub(" +", " ", _spaced(prediction, "\n\"'.,?!{}"))
    for opening in ANSWERS:
        place = text.find(opening)
        if place >= 0:
            after = text[place + len(opening) + 1 :]
            return float(any(after.startswith(reference) for reference in references))
    letter = next((word for word in text.split() if word in ("A", "B", "C", "D")), None)
    return float(letter in references)


def bug_letter(prediction: str, references: Sequence[str]) -> float:
    """code_debug: the letter "B." at the start, or letter or name after an "answer is"; references: [name, letter]."""
    letter = references[-1]
    if prediction[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = _spaced(prediction.strip(), "\n`'\"-*")
    text = re.sub(" +", " ", text.replace("Option", " ").replace("option", " "))
    for opening in ("answer is:", "is:", "answer:"):
        place = text.find(opening)
        if place >= 0:
            after = text[place + len(opening) + 1 :]
            return float(any(after.startswith(reference) for reference in references))
    return 0.0


def characters_f1(prediction: str, references: Sequence[str]) -> float:
    """longbook_qa_chn: the best F1 over characters."""
    answer = list(normalised_chinese(prediction))
    return max((f1(answer, list(normalised_chinese(reference))) for reference in references), default=0.0)


def rouge_lsum(prediction: str, references: Sequence[str]) -> float:
    """longbook_sum_eng: ROUGE-Lsum with stemming off, as `evaluate` computes it.

    Raises:
        ImportError: rouge-score is not installed.
    """
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise ImportError("longbook_sum_eng needs the package rouge-score: pip install rouge-score.") from error
    scorer = RougeScorer(["rougeLsum"])
    return max((scorer.score(reference, prediction)["rougeLsum"].fmeasure for reference in references), default=0.0)


def numbers_in_order(prediction: str, references: Sequence[str]) -> float:
    """math_calc: the share of the values that are right before the first wrong one."""
    numbers = re.findall(r"[0-9]+", prediction)
    right = 0
    while right < min(len(numbers), len(references)) and int(numbers[right]) == int(references[right]):
        right += 1
    return right / max(1, len(references))


def _spaced(text: str, characters: str) -> str:
    return text.translate(str.maketrans(characters, " " * len(characters)))


ALL = (
    first_number,
    kv_match,
    name_match,
    last_number,
    math_number,
    numbers_in_order,
    option_letter,
    bug_letter,
    characters_f1,
    rouge_lsum,
)
