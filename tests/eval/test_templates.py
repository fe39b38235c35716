"""Chat templates of every kind, and tokenizers that put something before a piece: the prompt is the whole text's."""

from __future__ import annotations

import logging

import pytest
from hf_attn_plugins.eval.prompts import Parts, Prompter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast, pipeline  # noqa: F401 (pipelines come first)

from hf_attn_plugins.star.hf.pipeline import split_prompts
from tests.eval.tiny import tokenizer

TURN = "{% for m in messages %}<user>%s</user>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
CONTENT = "m['content']"
PARTS = Parts('\n Read "this" & <that>.\n', "\nWhat is it? ", " It is", " One two three four." * 40)
MESSAGE = PARTS.context + PARTS.question
GOOD = {
    "plain": (f"{{{{ {CONTENT} }}}}", MESSAGE),
    "trim": (f"{{{{ {CONTENT} | trim }}}}", MESSAGE.strip()),
    "json": (f"{{{{ {CONTENT} | tojson }}}}", '"' + MESSAGE.replace('"', '\\"').replace("\n", "\\n") + '"'),
    "list": ("{% for part in " + CONTENT + " %}{{ part['text'] }}{% endfor %}", MESSAGE),
    "html": (
        f"{{{{ {CONTENT} | e }}}}",
        MESSAGE.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&#34;"),
    ),
}


def made(body: str):
    tok = tokenizer()
    tok.chat_template = TURN.replace("%s", body)
    return tok


@pytest.mark.parametrize("kind", GOOD)
def test_the_message_stands_where_the_template_puts_it(kind):
    body, shown = GOOD[kind]
    prompter = Prompter(made(body))
    assert prompter.text(prompter.whole(PARTS)) == f"<user>{shown}</user><assistant> It is"
    exact = prompter.exact(PARTS, 120)
    assert len(exact) == 120 and prompter.text(exact).endswith("</user><assistant> It is")
    assert prompter.ids(prompter.text(exact)) == exact  # tokens of the whole text


@pytest.mark.parametrize(
    "body",
    [
        "nothing",
        f"{{{{ {CONTENT} }}}} again {{{{ {CONTENT} }}}}",
        f"{{{{ {CONTENT} | upper }}}}",
        f"{{{{ {CONTENT} | length }}}} {{{{ {CONTENT} }}}}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_message_that_is_not_shown_exactly_once_is_refused_in_one_line(body):
    for ask in (lambda t: Prompter(t).whole(PARTS), lambda t: split_prompts(t, "Read this.", ["What?"], chat=True)):
        with pytest.raises(ValueError, match="chat template") as raised:
            ask(made(body))
        assert "\n" not in str(raised.value)


def test_short_messages_that_stand_in_the_frame_too_are_found():
    prompter = Prompter(made(f"{{{{ {CONTENT} }}}}"))
    assert prompter.text(prompter.whole(Parts("use", "r"))) == "<user>user</user><assistant>"


def thinking():
    tok = tokenizer()
    tok.chat_template = tok.chat_template.replace(
        "<|assistant|>\n{% endif %}",
        "<|assistant|>\n{% if enable_thinking is not defined or enable_thinking %}<think>\n{% else %}<think>\n\n"
        "</think>\n\n{% endif %}{% endif %}",
    )
    return tok


def test_a_prefix_inside_an_open_thought_is_a_warning_and_a_variable_closes_it(caplog):
    parts = Parts("c", " q", " A is")
    with caplog.at_level(logging.WARNING):
        prompter = Prompter(thinking())
        prompter.whole(parts), prompter.whole(parts)
    assert [record.getMessage().count("<think>") for record in caplog.records] == [1]
    caplog.clear()
    closed = Prompter(thinking(), template_args={"enable_thinking": False})
    assert closed.text(closed.whole(parts)).endswith("<think>\n\n</think>\n\n A is") and not caplog.records
    with pytest.raises(ValueError, match="--template-arg enable_thinking"):
        Prompter(thinking(), "no", {"enable_thinking": False})
    ids, (query,) = split_prompts(thinking(), "c", [" q"], chat=True, template_args={"enable_thinking": False})
    assert closed.text(ids + query).endswith("</think>\n\n")


def metaspace(scheme: str):
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    inner.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme=scheme), decoders.Fuse()]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    corpus = ["Read this. One two three four.\nWhat is it? It is"] * 9
    inner.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize(
    "make", [lambda: metaspace("first"), lambda: metaspace("always"), ByT5Tokenizer], ids=["first", "always", "slow"]
)
def test_tokens_are_those_of_the_whole_text_and_no_end_of_sequence_stands_in_a_prompt(make):
    tok = make()
    prompter, parts = Prompter(tok), Parts("Read this.\n", "What is it?", " It is", " One two three." * 30)
    whole = tok("Read this.\nWhat is it? It is")["input_ids"]
    assert prompter.whole(parts) == whole[:-1] and whole[-1] == tok.eos_token_id
    for tokens in (60, 61, 75):
        ids = prompter.exact(parts, tokens)
        text = tok.decode(ids, skip_special_tokens=True)
        assert len(ids) == tokens and text.startswith("Read this.") and text.endswith("What is it? It is")
        assert ids == tok(text)["input_ids"][:-1]
    long = Parts("Read é" + " née" * 200, " What is it?", " It is")
    cut = prompter.cut_in_the_middle(long, 90)
    assert 86 <= len(cut) <= 90 and "\N{REPLACEMENT CHARACTER}" not in tok.decode(cut)


def test_an_answers_tokens_are_those_of_the_text_that_goes_on():
    for tok in (tokenizer(), tokenizer(chat=False), metaspace("first")):
        prompter = Prompter(tok)
        for parts in (Parts("Read this.", " What is it?", " It is"), Parts("Read this.", " What is it?", " It is: ")):
            prompt, answer = prompter.whole(parts), prompter.answer_ids(parts, "three four")
            shown = tok.decode(prompt + answer, skip_special_tokens=True)
            assert shown.endswith(("It is three four", "It is: three four")), shown


@pytest.mark.parametrize("change", ("replace('\\n', ' ')", "wordwrap(10)", "length"))
def test_a_list_that_a_template_prints_is_not_the_message(change):
    tok = made(f"{{{{ {CONTENT} | {change} }}}}")
    with pytest.raises(ValueError, match="exactly once, as it was written"):
        Prompter(tok).whole(Parts("Read this very long line.", "\nWhat is it?"))
