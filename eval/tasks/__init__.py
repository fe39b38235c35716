"""The evaluation's tasks: one table, from which flags, groups and messages are made."""

from __future__ import annotations

import importlib

from hf_attn_plugins.ui.suggest import did_you_mean

from .task import Item, Setting, Task

__all__ = ["GROUPS", "TASKS", "Item", "Setting", "Task", "names_of", "task"]

_NIAH = ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3", "multivalue", "multiquery")
_LONGBENCH = (
    *("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh", "hotpotqa", "2wikimqa", "musique", "dureader"),
    *("gov_report", "qmsum", "multi_news", "vcsum", "trec", "triviaqa", "samsum", "lsht", "passage_count"),
    *("passage_retrieval_en", "passage_retrieval_zh", "lcc", "repobench-p"),
)
_LONGBENCH_E = (
    *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum"),
    *("passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)
_INFINITE = (
    *("passkey", "number_string", "kv_retrieval", "longbook_sum_eng", "longbook_qa_eng", "longbook_choice_eng"),
    *("longbook_qa_chn", "longdialogue_qa_eng", "math_find", "math_calc", "code_run", "code_debug"),
)

# Name on the command line -> (module, class, name in its suite).
TASKS: dict[str, tuple[str, str, str]] = {
    **{f"niah_{name}": ("niah", "Needles", f"niah_{name}") for name in _NIAH},
    "vt": ("vt", "VariableTracking", "vt"),
    "cwe": ("word_lists", "CommonWords", "cwe"),
    "fwe": ("word_lists", "FrequentWords", "fwe"),
    "qa_1": ("qa", "QuestionAnswering", "qa_1"),
    "qa_2": ("qa", "QuestionAnswering", "qa_2"),
    **{f"longbench/{name}": ("longbench", "LongBench", name) for name in _LONGBENCH},
    **{f"longbench/{name}_e": ("longbench", "LongBench", f"{name}_e") for name in _LONGBENCH_E},
    "longbench_v2": ("longbench", "LongBenchV2", "longbench_v2"),
    **{f"infinitebench/{name}": ("infinitebench", "InfiniteBench", name) for name in _INFINITE},
    **{f"babilong/qa{n}": ("babilong", "BabiLong", f"qa{n}") for n in range(1, 6)},
    **{name: ("text", "TextTask", name) for name in ("ppl", "agreement", "speed")},
}

_FREE = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
GROUPS: dict[str, tuple[str, ...]] = {
    "ruler": _FREE,  # what needs no download
    "ruler_essay": tuple(f"niah_{name}" for name in _NIAH if f"niah_{name}" not in _FREE),
    "ruler_qa": ("qa_1", "qa_2"),
    "longbench": tuple(f"longbench/{name}" for name in _LONGBENCH),
    "longbench_e": tuple(f"longbench/{name}_e" for name in _LONGBENCH_E),
    "infinitebench": tuple(f"infinitebench/{name}" for name in _INFINITE),
    "babilong": tuple(f"babilong/qa{n}" for n in range(1, 6)),
}


def names_of(words: list[str]) -> list[str]:
    """Tasks in the order asked for, groups written out, each once.

    Raises:
        ValueError: a word that is neither task nor group.
    """
    found: dict[str, None] = {}
    for word in words:
        if word not in TASKS and word not in GROUPS:
            hint = did_you_mean(word, [*GROUPS, *TASKS])
            known = [*GROUPS, *(name for name in TASKS if "/" not in name)]
            raise ValueError(
                f"no task {word!r}{hint}: choose from {', '.join(known)}, or one of a suite, such as longbench/qasper."
            )
        found.update(dict.fromkeys(GROUPS.get(word, (word,))))
    if not found:
        raise ValueError("no tasks: name at least one, for example --tasks ruler,ppl.")
    return list(found)


def task(name: str, setting: Setting) -> Task:
    """The task called `name`, its data read.

    Raises:
        ValueError, ImportError: it cannot be asked with these data; the message says why.
    """
    module, kind, inner = TASKS[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)(inner, setting)
