"""Texts as the bags of words that metrics compare."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

CHINESE_PUNCTUATION = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠"
    "｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)


def f1(prediction: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of two bags of words."""
    same = sum((Counter(prediction) & Counter(reference)).values())
    return 2 * same / (len(prediction) + len(reference)) if same else 0.0


def normalised(text: str) -> list[str]:
    """Words in lower case, punctuation and articles removed, as SQuAD's evaluation does."""
    text = "".join(c for c in text.lower() if c not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def normalised_chinese(text: str) -> str:
    """Text in lower case without punctuation and white space."""
    return "".join(c for c in text.lower() if c not in string.punctuation + CHINESE_PUNCTUATION and not c.isspace())
