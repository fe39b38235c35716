"""ROUGE-L over the sentences of two texts, as the package `rouge` computes it, which LongBench scores with."""

from __future__ import annotations

from collections.abc import Sequence


def rouge_l(prediction: str, reference: str) -> float:
    """F1 of the distinct words in the longest common subsequences of all pairs of sentences.

    Sentences end at full stops. With S the union, over all pairs, of the words in one longest common subsequence:
    recall = |S| / distinct words of the reference, precision = |S| / distinct words of the prediction.
    """
    hypothesis, truth = _sentences(prediction), _sentences(reference)
    words, wanted = ({word for sentence in side for word in sentence} for side in (hypothesis, truth))
    if not words or not wanted:
        return 0.0
    common: set[str] = set()
    for expected in truth:
        for said in hypothesis:
            common.update(common_subsequence(expected, said))
    precision, recall = len(common) / len(words), len(common) / len(wanted)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def common_subsequence(a: Sequence[str], b: Sequence[str]) -> list[str]:
    """One longest common subsequence of two sequences."""
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if x == y else max(table[i - 1][j], table[i][j - 1])
    found, i, j = [], len(a), len(b)
    while i and j:
        if a[i - 1] == b[j - 1]:
            found.append(a[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found[::-1]


def _sentences(text: str) -> list[list[str]]:
    return [words for sentence in text.split(".") if (words := sentence.split())]
