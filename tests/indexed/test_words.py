"""Words, vocabularies and misspellings."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_plugins.indexed.words import ALPHABET, Vocabulary, by_frequency, misspell, words_of


def test_the_seeds_example():
    vocabulary = Vocabulary(length=8)
    assert vocabulary.size == 64
    assert vocabulary.encode(["apple"]).tolist() == [[1, 16, 16, 12, 5, 0, 0, 0]]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.text(ALPHABET, max_size=9), max_size=5))
def test_known_words_survive_a_round_trip(words):
    vocabulary = Vocabulary(length=9)
    encoded = vocabulary.encode(words)
    assert encoded.shape == (len(words), 9)
    assert vocabulary.decode(encoded) == words


def test_unknown_characters_and_long_words():
    vocabulary = Vocabulary(length=3, alphabet="ab")
    assert vocabulary.encode(["é-abba", ""]).tolist() == [[3, 3, 1], [0, 0, 0]]
    assert vocabulary.decode(vocabulary.encode(["éa"])) == ["\N{REPLACEMENT CHARACTER}a"]


def test_bad_vocabularies_are_refused():
    with pytest.raises(ValueError, match="'a'"):
        Vocabulary(alphabet="aba")
    with pytest.raises(ValueError, match="length=0"):
        Vocabulary(length=0)


def test_words_in_order_of_frequency():
    assert by_frequency(words_of("b_a, c a-b; b's über 12")) == ["b", "a", "c", "s", "über", "12"]


@settings(deadline=None, max_examples=100)
@given(st.text("abz", min_size=1, max_size=8), st.integers(0, 1000))
def test_a_misspelling_is_one_edit_away(word, seed):
    wrong = misspell(word, random.Random(seed))
    assert wrong != word and wrong and abs(len(wrong) - len(word)) <= 1
    changed = [i for i, (a, b) in enumerate(zip(wrong, word)) if a != b]
    if len(wrong) == len(word):
        assert len(changed) <= 2
