"""Prompts: the chat frame, the answer prefix after its header, BOS or none, exact lengths, cuts in the middle."""

from __future__ import annotations

import pytest
from hf_attn_plugins.eval.running.fitting import largest
from hf_attn_plugins.eval.running.prompts import Parts, Prompter, opening
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.eval.tiny import tokenizer

PARTS = Parts("Read this.\nOne two three.", "\nWhat is it?", " It is", "\nFour five six seven." * 20)


def test_with_a_chat_template_the_answer_prefix_follows_the_assistants_header():
    prompter = Prompter(tokenizer())
    text = prompter.text(prompter.whole(PARTS))
    assert text == "<|user|>\nRead this.\nOne two three.\nWhat is it?<|end|>\n<|assistant|>\n It is"


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("kind", [{"chat": "no"}, {"template": False}])
def test_without_a_template_the_prompt_is_plain_text_behind_a_bos_where_there_is_one(kind, bos):
    made = tokenizer(chat=kind.get("template", True), bos=bos)
    prompter = Prompter(made, kind.get("chat", "auto"))
    text = prompter.text(prompter.whole(PARTS))
    assert text == ("<s>" if bos else "") + "Read this.\nOne two three.\nWhat is it? It is"
    assert opening(made) == ([0] if bos else [])


def test_a_template_that_is_not_there_cannot_be_asked_for():
    with pytest.raises(ValueError, match="no chat template"):
        Prompter(tokenizer(chat=False), "yes")
    with pytest.raises(ValueError, match="chat='maybe'"):
        Prompter(tokenizer(), "maybe")


@settings(max_examples=25, deadline=None)
@given(st.integers(40, 120), st.booleans(), st.booleans())
def test_exact_prompts_have_the_length_asked_for_and_keep_both_ends(tokens, chat, bos):
    prompter = Prompter(tokenizer(chat=chat, bos=bos))
    ids = prompter.exact(PARTS, tokens)
    assert len(ids) == tokens
    whole, text = prompter.text(prompter.whole(PARTS)), prompter.text(ids)
    head, tail = whole.split("\nWhat")
    assert text.startswith(head) and text.endswith("\nWhat" + tail)


def test_exact_prompts_that_cannot_be_are_refused():
    prompter = Prompter(tokenizer())
    with pytest.raises(ValueError, match="10 were asked for"):
        prompter.exact(PARTS, 10)
    with pytest.raises(ValueError, match="tokens of filler are needed"):
        prompter.exact(PARTS, 4000)


@settings(max_examples=25, deadline=None)
@given(st.integers(40, 400), st.booleans())
def test_long_prompts_lose_their_middle_only(tokens, chat):
    prompter = Prompter(tokenizer(chat=chat))
    parts = Parts("HEAD " + "word " * 300, " TAIL", " Answer:")
    ids = prompter.cut_in_the_middle(parts, tokens)
    text = prompter.text(ids)
    whole = prompter.whole(parts)
    assert len(ids) == min(tokens, len(whole))
    assert "HEAD word" in text and text.endswith(" Answer:") and " TAIL" in text
    assert text.startswith("<|user|>\nHEAD" if chat else "HEAD")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=300), st.integers(0, 900), st.integers(0, 20))
def test_the_search_finds_the_largest_that_fits_in_few_steps(steps, limit, low):
    sums = [0]
    for step in steps:
        sums.append(sums[-1] + step)
    low, high, asked = min(low, len(steps)), len(steps), []
    found = largest(lambda n: asked.append(n) or sums[n], limit, low, high)
    fitting = [n for n in range(low, high + 1) if sums[n] <= limit]
    assert found == (max(fitting) if fitting else None)
    assert len(asked) <= 2 * (high - low + 1).bit_length() + 2


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 50), min_size=1, max_size=100), st.integers(0, 50))
def test_the_search_ends_whatever_the_counts_are(counts, limit):
    asked = []
    found = largest(lambda n: asked.append(n) or counts[n], limit, 0, len(counts) - 1)
    assert len(asked) <= 2 * len(counts).bit_length() + 2
    assert found is None or counts[found] <= limit


def test_the_former_addresses_of_prompts_and_measurements():
    from hf_attn_plugins.eval import measure, prompts
    from hf_attn_plugins.eval.running import measure as new_measure
    from hf_attn_plugins.eval.running import prompts as new_prompts

    assert all(getattr(prompts, name) is getattr(new_prompts, name) for name in prompts.__all__)
    assert all(getattr(measure, name) is getattr(new_measure, name) for name in measure.__all__)
