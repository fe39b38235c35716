"""Metrics against cases computed by hand from the benchmarks' own definitions."""

from __future__ import annotations

import pytest
from hf_attn_plugins.eval.scoring.metrics import METRICS, score

# metric, prediction, references, arguments, expected
CASES = [
    # RULER: a substring per reference, upper and lower case alike; the mean for all tasks but QA
    ("string_match_all", "They are 12, 34.", ["12", "34"], {}, 1.0),
    ("string_match_all", "only 12", ["12", "34"], {}, 0.5),
    ("string_match_all", "1234567890", ["345"], {}, 1.0),
    ("string_match_all", "ABCDE fghij", ["abcde", "FGHIJ", "x"], {}, 2 / 3),
    ("string_match_all", "", ["1"], {}, 0.0),
    # one of two references: 1 in RULER's QA (0.5 in other harnesses)
    ("string_match_part", "In Paris.", ["paris", "France"], {}, 1.0),
    ("string_match_part", "in paris.", ["PARIS", "France"], {}, 1.0),
    ("string_match_part", "IN PARIS.", ["Rome", "Paris"], {}, 1.0),
    ("string_match_part", "In Rome.", ["paris", "France"], {}, 0.0),
    # SQuAD's F1: articles and punctuation go; 2 of 3 words each -> 2 * 2 / (3 + 2)
    ("qa_f1", "The big, red Fox", ["red fox"], {}, 0.8),
    ("qa_f1", "blue", ["red fox", "a blue"], {}, 1.0),
    ("qa_f1", "", ["red"], {}, 0.0),
    ("qa_f1", "a a a", ["the"], {}, 0.0),
    # LongBench's ROUGE-L: words of a common subsequence {the, cat, mat}; 3 of 4 and of 5 distinct words
    ("rouge", "the cat on mat", ["the cat sat the mat under"], {}, 2 * 0.75 * 0.6 / 1.35),
    ("rouge", "a b. c d", ["c d. a b"], {}, 1.0),
    ("rouge", "", ["c d"], {}, 0.0),
    ("classification", "Type: Food.", ["Food"], {"all_classes": ["Food", "Animal"]}, 1.0),
    ("classification", "Food or Animal", ["Food"], {"all_classes": ["Food", "Animal"]}, 0.5),
    ("classification", "Sea food", ["Sea food"], {"all_classes": ["food", "Sea food"]}, 1.0),
    ("classification", "Animal", ["Food"], {"all_classes": ["Food", "Animal"]}, 0.0),
    ("count_score", "7 or 8, rather 7", ["7"], {}, 2 / 3),
    ("count_score", "none", ["7"], {}, 0.0),
    ("retrieval_score", "Paragraph 12", ["Paragraph 12"], {}, 1.0),
    ("retrieval_score", "Paragraph 1 or 12", ["Paragraph 12"], {}, 0.5),
    ("code_similarity", "```python\n# say x\n\nx = 1\ny", ["x = 1"], {}, 1.0),
    ("code_similarity", "abcd", ["bcde"], {}, 0.75),  # three of four letters in common: 2 * 3 / 8
    ("code_similarity", "# only a remark", ["x"], {}, 0.0),
    ("choice_letter", "The correct answer is (B).", ["B"], {}, 1.0),
    ("choice_letter", "**The correct answer is C**", ["C"], {}, 1.0),
    ("choice_letter", "B", ["B"], {}, 0.0),
    # BABILong: the target is the only label of the first sentence, those of the question left aside
    ("label_match", "In the garden. Not the office.", ["garden"], {"labels": ["garden", "office"]}, 1.0),
    ("label_match", "garden or office", ["garden"], {"labels": ["garden", "office"]}, 0.0),
    (
        "label_match",
        "From the office to the Garden",
        ["garden"],
        {"labels": ["garden", "office"], "question": "Where was she before the office?"},
        1.0,
    ),
    # InfiniteBench
    ("first_number", "The key is 71432, not 9.", ["71432"], {}, 1.0),
    ("first_number", "9 then 71432", ["71432"], {}, 0.0),
    ("kv_match", '{"k": "ab-12"}', ["ab-12"], {}, 1.0),
    ("kv_match", "ab-123", ["ab-12"], {}, 0.0),
    ("name_match", "bob.", ["BOB", "ROBERT"], {}, 1.0),
    ("name_match", "Robert", ["BOB", "ROBERT"], {}, 0.0),
    ("last_number", "so it is: -42.", ["-42"], {}, 1.0),
    ("last_number", "-42 it is", ["-42"], {}, 0.0),
    ("math_number", "The largest is 3.50", ["3.5"], {}, 1.0),
    ("math_number", "12", ["13"], {}, 0.0),
    ("numbers_in_order", "[1, 4, 9]", ["1", "4", "8", "7"], {}, 0.5),
    ("option_letter", "B", ["the text", "B"], {}, 1.0),
    ("option_letter", "I think the answer is: C", ["the text", "C"], {}, 1.0),
    ("option_letter", "I say D rather than C", ["the text", "C"], {}, 0.0),
    ("option_letter", "", ["the text", "C"], {}, 0.0),
    ("bug_letter", "B. func", ["func", "B"], {}, 1.0),
    ("bug_letter", "My answer is: func", ["func", "B"], {}, 1.0),
    ("bug_letter", "perhaps B", ["func", "B"], {}, 0.0),
    ("characters_f1", "红楼梦", ["红楼"], {}, 0.8),
    ("rouge_lsum", "the cat", ["the cat"], {}, 1.0),
]


@pytest.mark.parametrize(("metric", "prediction", "references", "arguments", "expected"), CASES)
def test_metric(metric, prediction, references, arguments, expected):
    assert score(metric, prediction, references, **arguments) == pytest.approx(expected)


def test_every_metric_has_a_case():
    import importlib.util

    chinese = {"qa_f1_zh", "rouge_zh"} if importlib.util.find_spec("jieba") is None else set()
    assert set(METRICS) - {case[0] for case in CASES} <= chinese | {"qa_f1_zh", "rouge_zh"}


@pytest.mark.parametrize("metric", ["qa_f1_zh", "rouge_zh"])
def test_chinese_metrics_work_or_name_the_package(metric):
    import importlib.util

    if importlib.util.find_spec("jieba") is None:
        with pytest.raises(ImportError, match="pip install jieba"):
            score(metric, "你好", ["你好"])
    else:
        assert score(metric, "你好", ["你好"]) == 1.0
