"""RULER's generators: exact length, the needle once, the answer derivable, and the published prompt formats."""

from __future__ import annotations

import functools
import json
import re
from collections import Counter

import pytest
from hf_attn_plugins.eval import tasks
from hf_attn_plugins.eval.prompts import Prompter
from hf_attn_plugins.eval.tasks.word_lists import zeta_count
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.eval.tiny import tokenizer

pytest.importorskip("wonderwords")

NIAH = [name for name in tasks.TASKS if name.startswith("niah")]
BUDGET = {**dict.fromkeys(NIAH, 128), "vt": 30, "cwe": 120, "fwe": 50}


@functools.cache
def made(name: str, chat: bool = False, bos: bool = False):
    return tasks.task(name, tasks.Setting(Prompter(tokenizer(chat=chat, bos=bos)), haystack="pydoc"))


def ask(name: str, length: int, index: int = 0, **kind: bool):
    task = made(name, **kind)
    item = task.item(length, index)
    return item.sample, task.setting.prompter.text(item.ids)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(list(BUDGET)), st.integers(1500, 2500), st.integers(0, 99), st.booleans(), st.booleans())
def test_every_task_has_exactly_the_length_asked_for_and_is_the_same_again(name, length, index, chat, bos):
    task = made(name, chat, bos)
    item = task.item(length, index)
    assert len(item.ids) == item.sample.tokens == length - BUDGET[name]
    assert item.sample.max_new_tokens == BUDGET[name] and item.sample.length == length
    again = tasks.task(name, task.setting).item(length, index)
    assert again.ids == item.ids and again.sample == item.sample
    assert task.item(length, index + 1).ids != item.ids


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(NIAH), st.integers(1024, 2000), st.integers(0, 50))
def test_needles_stand_in_the_context_once_and_give_the_answer(name, length, index):
    sample, text = ask(name, length, index)
    context, _, question = text.rpartition("\nWhat ")
    keys = re.search(r"for (.+?) mentioned", question).group(1)
    keys = re.split(r", and |, ", keys)
    found = re.findall(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.", context)
    answers = [value for key, value in found if key in keys]
    assert Counter(answers) == Counter(sample.references) and len(set(sample.references)) == len(sample.references)
    assert all(context.count(reference) == 1 for reference in sample.references)
    assert len(keys) == (4 if name == "niah_multiquery" else 1)
    assert len(sample.references) == (4 if name in ("niah_multiquery", "niah_multivalue") else 1)
    assert 0.0 <= sample.depth <= 1.0
    if name in ("niah_single_1", "niah_multikey_2"):
        place = context.index(sample.references[0]) / len(context)
        assert abs(place - sample.depth) < 0.12


def test_depths_spread_evenly_over_few_samples():
    depths = sorted(ask("niah_single_1", 700, index)[0].depth for index in range(8))
    gaps = [b - a for a, b in zip([0.0, *depths], [*depths, 1.0], strict=True)]
    assert max(gaps) < 0.3


@settings(max_examples=5, deadline=None)
@given(st.integers(1400, 2000), st.integers(0, 50))
def test_a_chain_of_variables_can_be_followed(length, index):
    sample, text = ask("vt", length, index)
    value = re.findall(r"assigned the value (\d+), they are", text)[-1]
    _, _, context = text.rpartition("Memorize and track")
    assignments = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", context)
    known, names = {value}, []
    for name, source in assignments:
        if source in known:
            known.add(name)
            names.append(name)
    assert names == sample.references and len(names) == 5


@settings(max_examples=4, deadline=None)
@example(1600, 36)  # has a word of two words
@given(st.sampled_from([1600, 1900, 5000]), st.integers(0, 50))
def test_the_common_words_are_the_most_frequent_of_the_list(length, index):
    sample, text = ask("cwe", length, index)
    context = text.rpartition("Memorize the ones that appear most often.\n")[2].partition("\nQuestion")[0]
    entries = re.findall(r"(\d+)\. (.+?)(?= \d+\. |$)", context)  # a word may be two: "ice cream"
    assert [int(number) for number, _ in entries] == list(range(1, len(entries) + 1))
    counts = Counter(word for _, word in entries)
    most = {word for word, _ in counts.most_common(10)}
    assert most == set(sample.references)
    assert min(counts[word] for word in most) >= (5 if length < 4096 else 29)
    assert max(n for word, n in counts.items() if word not in most) <= 3


@settings(max_examples=4, deadline=None)
@given(st.integers(1000, 2500), st.integers(0, 50))
def test_the_coded_words_rank_by_their_counts(length, index):
    sample, text = ask("fwe", length, index)
    context = text.partition("coded words. ")[2].partition("\nQuestion")[0]
    counts = Counter(re.findall(r"[a-z]{6}", context))
    ranked = [word for word, _ in counts.most_common(4)]
    assert ranked[:3] == sample.references
    assert counts[ranked[2]] > counts[ranked[3]]
    assert context.count("...") > counts[ranked[0]]


def test_zeta_counts_separate_the_third_word_from_the_fourth():
    assert all(zeta_count(n, 2) > zeta_count(n, 3) > zeta_count(n, 4) > zeta_count(n, 5) for n in range(53, 5000))


# What RULER's scripts (data/synthetic/constants.py and the generators) print around context and question.
FORMATS = {
    "niah_single_1": (
        "A special magic number is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the number afterwards.\n",
        r"\nWhat is the special magic number for [a-z-]+ mentioned in the provided text\? The special magic number for "
        r"[a-z-]+ mentioned in the provided text is",
    ),
    "niah_multivalue": (
        "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you "
        "about the numbers afterwards.\n",
        r"\nWhat are all the special magic numbers for [a-z-]+ mentioned in the provided text\? The special magic "
        r"numbers for [a-z-]+ mentioned in the provided text are",
    ),
    "niah_multikey_3": (
        "A special magic uuid is hidden within the following text. Make sure to memorize it. I will quiz you about "
        "the uuid afterwards.\nOne of the special magic uuids for ",
        r"\nWhat is the special magic uuid for [0-9a-f-]{36} mentioned in the provided text\? The special magic uuid "
        r"for [0-9a-f-]{36} mentioned in the provided text is",
    ),
    "vt": (
        "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n",
        r"\nQuestion: Find all variables that are assigned the value \d{5} in the text above\. Answer: According to "
        r"the chain\(s\) of variable assignment in the text above, 5 variables are assigned the value \d{5}, they "
        r"are: ",
    ),
    "cwe": (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        "appear most often.\n1. ",
        r"\nQuestion: What are the 10 most common words in the above list\? Answer: The top 10 words that appear most "
        r"often in the list are:",
    ),
    "fwe": (
        "Read the following coded text and track the frequency of each coded word. Find the three most frequently "
        "appeared coded words. ",
        r"\nQuestion: Do not provide any explanation\. Please ignore the dots '\.\.\.\.'\. What are the three most "
        r"frequently appeared words in the above coded text\? Answer: According to the coded text above, the three "
        r"most frequently appeared words are:",
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_prompts_have_the_published_format(name):
    text = ask(name, 1800)[1]
    head, tail = FORMATS[name]
    assert text.startswith(head)
    assert re.search(tail + r"\Z", text)


def test_worked_examples_stand_before_vt_and_cwe():
    text = ask("vt", 1500)[1]
    answer = r"they are:  ([A-Z]{3} ){4}[A-Z]{3}\n\nMemorize and track"
    assert re.search(answer, text) and text.count("Memorize and track") == 2
    text = ask("cwe", 1500)[1]
    assert re.search(r"list are: 1\. \S+ 2\. \S+ .* 10\. \S+\nBelow is a numbered list", text)


def test_without_rulers_own_essay_the_name_says_so(tmp_path):
    assert ask("niah_single_2", 1024)[0].task == "niah_single_2_pydoc"
    assert ask("niah_single_1", 1024)[0].task == "niah_single_1"
    own = tmp_path / "PaulGrahamEssays.json"
    own.write_text(json.dumps({"text": "An essay is short. It has sentences. " * 30}), encoding="utf-8")
    mine = tmp_path / "My book.txt"
    mine.write_text("A book is long. " * 60, encoding="utf-8")
    for path, title in ((own, "niah_single_2"), (mine, "niah_single_2_my_book")):
        setting = tasks.Setting(Prompter(tokenizer()), haystack=str(path))
        item = tasks.task("niah_single_2", setting).item(1024, 0)
        assert item.sample.task == title and len(item.ids) == 1024 - 128


SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Town {n} lies at river {n}.",
                    "qas": [
                        {"question": f"Where is {n}?", "answers": [{"text": f"river {n}"}], "is_impossible": False},
                        {"question": "?", "answers": [], "is_impossible": True},
                    ],
                }
                for n in range(k, k + 5)
            ]
        }
        for k in (0, 5)
    ]
}
HOTPOT = [
    {
        "question": f"Who is {n}?",
        "answer": f"name{n}",
        "context": [[f"T{n}", ["He is ", f"name{n}."]], [f"U{n}", ["No."]]],
    }
    for n in range(6)
]


@pytest.mark.parametrize(("name", "file", "data"), [("qa_1", "squad", SQUAD), ("qa_2", "hotpotqa", HOTPOT)])
def test_questions_stand_after_their_documents_among_others(tmp_path, name, file, data):
    path = tmp_path / f"{file}.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    prompter = Prompter(tokenizer(chat=False))
    task = tasks.task(name, tasks.Setting(prompter, haystack=f"pydoc,{path}"))
    item = task.item(600, 1)
    text = prompter.text(item.ids)
    assert item.sample.task == name and item.sample.metric == "string_match_part" and len(item.ids) == 600 - 32
    assert item.sample.references[0] in text
    assert re.search(r"Question: (Where|Who) is 1\? Answer:\Z", text)
    assert text.startswith("Answer the question based on the given documents.") and "\n\nDocument 2:\n" in text
    assert task.available(600) == (10 if name == "qa_1" else 6)
    numbers = [int(n) for n in re.findall(r"Document (\d+):", text)]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("name", ["niah_single_1", "cwe", "vt", "niah_multikey_3", "fwe"])
def test_a_length_too_short_is_refused_at_once(name):
    with pytest.raises(ValueError, match=f"{name} does not fit into --lengths 200"):
        ask(name, 200)


def test_missing_haystacks_are_named():
    setting = tasks.Setting(Prompter(tokenizer()))
    with pytest.raises(ValueError, match="niah_single_2 hides its needles in an essay"):
        tasks.task("niah_single_2", setting)
    with pytest.raises(ValueError, match=r"qa_1 asks about documents: .*squad\.json"):
        tasks.task("qa_1", setting)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", "{", "no JSON"),
        ("a.json", "[]", "neither a text nor questions"),
        ("a.json", '[{"body": 1}]', "fields body"),
        ("a.txt", "  \n", "no text in it"),
        ("a.json", '[{"question": "q", "context": "c"}]', "the field answers"),
    ],
)
def test_haystacks_that_hold_nothing_are_refused(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        tasks.task("niah_single_2", tasks.Setting(Prompter(tokenizer()), haystack=str(path)))
