"""LongBench, LongBench-v2, InfiniteBench and BABILong on tiny local files in the data sets' own formats."""

from __future__ import annotations

import pytest
from hf_attn_plugins.eval import tasks
from hf_attn_plugins.eval.prompts import Prompter
from hf_attn_plugins.eval.scoring.metrics import score
from hf_attn_plugins.eval.tasks.infinitebench import formats as infinite_formats
from hf_attn_plugins.eval.tasks.longbench import formats

from tests.eval.tiny import jsonl, tokenizer


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)


def ask(name: str, suite: str, folder, length: int = 1024, chat: bool = False, index: int = 0):
    task = tasks.task(name, tasks.Setting(Prompter(tokenizer(chat=chat)), data={suite: str(folder)}))
    item = task.item(length, index)
    return task, item, task.setting.prompter.text(item.ids)


LONG = "".join(f"Passage {n}: nothing to see. " for n in range(400))


def longbench_row(**changes):
    row = {"input": "Who?", "context": LONG, "answers": ["Ann", "Anna"], "length": 2400, "dataset": "x"}
    return {**row, "language": "en", "all_classes": None, "_id": "1", **changes}


def test_longbench_cuts_the_middle_and_keeps_the_question(tmp_path):
    jsonl(tmp_path / "data" / "hotpotqa.jsonl", [longbench_row(), longbench_row(context="Short.")])
    task, item, text = ask("longbench/hotpotqa", "longbench", tmp_path)
    assert len(item.ids) == 1024 - 32 and item.sample.metric == "qa_f1" and task.available(1024) == 2
    assert text.startswith("Answer the question based on the given passages. Only give me the answer")
    assert text.endswith("\n\nQuestion: Who?\nAnswer:")
    assert "Passage 0:" in text and "Passage 399:" in text and "Passage 200:" not in text
    assert score(item.sample.metric, "It was Ann.", item.sample.references) == pytest.approx(0.5)
    assert (
        "following are given passages.\nShort.\n\nAnswer"
        in ask("longbench/hotpotqa", "longbench", tmp_path, index=1)[2]
    )


def test_longbench_few_shot_tasks_go_without_chat_and_count_their_first_line(tmp_path):
    classes = ["Food", "Animal"]
    jsonl(tmp_path / "trec.jsonl", [longbench_row(context="Q\nType: Food", all_classes=classes, answers=["Food"])])
    jsonl(tmp_path / "qasper.jsonl", [longbench_row(context="Short.")])
    _, item, text = ask("longbench/trec", "longbench", tmp_path, chat=True)
    assert "<|user|>" not in text and text.endswith("Q\nType: Food\nWho?")
    assert item.stop == "\n" and item.arguments == {"all_classes": classes}
    _, item, text = ask("longbench/qasper", "longbench", tmp_path, chat=True)
    assert text.startswith("<|user|>\nYou are given a scientific article") and text.endswith(
        "Answer:<|end|>\n<|assistant|>\n"
    )
    assert item.stop == "" and item.sample.max_new_tokens == 128


def test_longbench_has_21_tasks_whose_formats_take_context_and_input():
    assert len(formats()) == 21 == len(tasks.GROUPS["longbench"]) and len(tasks.GROUPS["longbench_e"]) == 13
    for row in formats().values():
        assert row.prompt.count("{context}") == 1 and row.prompt.count("{input}") <= 1


def test_longbench_v2_asks_for_a_letter(tmp_path):
    choices = {f"choice_{letter}": f"choice {letter.lower()} " for letter in "ABCD"}
    jsonl(tmp_path / "data.jsonl", [{"context": LONG, "question": "Which? ", **choices, "answer": "C"}])
    _, item, text = ask("longbench_v2", "longbench_v2", tmp_path)
    assert text.startswith("Please read the following text and answer the question below.\n\n<text>\nPassage 0:")
    assert text.endswith(
        "</text>\n\nWhat is the correct answer to this question: Which?\nChoices:\n(A) choice a\n(B) choice b\n"
        '(C) choice c\n(D) choice d\n\nFormat your response as follows: "The correct answer is (insert answer here)".'
    )
    assert item.sample.references == ["C"] and len(item.ids) == 1024 - 128


INFINITE = {
    "passkey": ({"input": "What is the pass key?", "answer": ["71432"]}, "The pass key is", "71432."),
    "kv_retrieval": ({"input": 'Key: "a"', "answer": ["v-1"]}, 'Key: "a"', '"v-1"'),
    "longbook_choice_eng": (
        {"input": "Who?", "answer": ["Bo"], "options": ["Al", "Bo", "Cy", "Di"]},
        "The letter of the correct answer is",
        "B",
    ),
    "code_debug": (
        {"input": "", "answer": ["f"], "options": ["e", "f", "g", "h"]},
        "The correct option is:",
        "B. f",
    ),
    "code_run": (
        {"input": "Please give me the value of func_7(-3).", "answer": ["5"]},
        "The value of func_7(-3) is",
        "5",
    ),
    "math_find": ({"input": "The largest number of the list is:", "answer": ["9"]}, "of the list is:", "9"),
    "math_calc": ({"input": "", "answer": ["1", "2"]}, "Values:", "[1, 2]"),
    "longdialogue_qa_eng": ({"input": "", "answer": ["BOB"]}, "replaced with $$MASK$$ is likely", "Bob"),
    "longbook_qa_chn": ({"input": "谁?", "answer": ["王"]}, "问题：谁?\n答案：", "王"),
}


@pytest.mark.parametrize("name", INFINITE)
@pytest.mark.parametrize("chat", [False, True])
def test_infinitebench_asks_in_its_own_words_and_scores_them(tmp_path, name, chat):
    row, end, answer = INFINITE[name]
    jsonl(tmp_path / f"{name}.jsonl", [{"id": 0, "context": LONG, "options": [], **row}])
    length = 40_000 if name == "math_calc" else 2000
    _, item, text = ask(f"infinitebench/{name}", "infinitebench", tmp_path, length, chat)
    assert len(item.ids) <= length - infinite_formats()[name]["max_new_tokens"]
    assert (text.endswith("<|end|>\n<|assistant|>\n")) if chat else text.endswith(end)
    assert score(item.sample.metric, answer, item.sample.references, **item.arguments) == 1.0
    if name == "math_find":
        assert "What is the largest number in the following list?" in text


def test_infinitebench_has_twelve_tasks():
    assert len(tasks.GROUPS["infinitebench"]) == 12 and set(infinite_formats()) == {
        name.partition("/")[2] for name in tasks.GROUPS["infinitebench"]
    }


@pytest.mark.parametrize("place", ["qa1/2k.jsonl", "2k/qa1.jsonl"])
def test_babilong_reads_the_configuration_of_the_length_and_cuts_nothing(tmp_path, place):
    jsonl(
        tmp_path / place,
        [{"input": "Mary went to the garden. " + LONG, "question": "Where is Mary? ", "target": "garden"}],
    )
    jsonl(tmp_path / "qa1" / "4k.jsonl", [{"input": "x", "question": "y", "target": "z"}])
    _, item, text = ask("babilong/qa1", "babilong", tmp_path, 2048)
    assert text.startswith("I will give you context with the facts about positions of different persons")
    assert text.endswith("\n</context>\nQuestion: Where is Mary?") and LONG in text
    assert score(item.sample.metric, "Mary is in the garden.", item.sample.references, **item.arguments) == 1.0
    with pytest.raises(ValueError, match="--lengths 3000"):
        ask("babilong/qa1", "babilong", tmp_path, 3000)
    with pytest.raises(ValueError, match=r"neither qa1/8k\.json"):
        ask("babilong/qa1", "babilong", tmp_path, 8192)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"hotpotqa\.jsonl is empty"),
        ([{"context": "c", "input": "i"}], "lacks the field answers; it has context, input"),
        (None, r"no hotpotqa\.jsonl"),
    ],
)
def test_data_that_cannot_be_used_is_named(tmp_path, rows, message):
    if rows is not None:
        jsonl(tmp_path / "hotpotqa.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        ask("longbench/hotpotqa", "longbench", tmp_path)


def test_a_hub_id_offline_says_how_to_go_online():
    with pytest.raises(ValueError, match="Nothing is downloaded without --online"):
        ask("longbench/hotpotqa", "longbench", "nobody/nothing-of-that-name")
