"""`pipeline("star-text-generation")` with a tokenizer trained here."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, pipeline

from hf_attn_plugins.star.hf.pipeline import TASK, register_pipeline, split_prompts
from hf_attn_plugins.star.plan import Plan

from .families import oracle, tiny

TEXT = "The quick brown fox jumps over the lazy dog. Who jumps over what? The fox does, quickly and often,\n\nsays he. "
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


FIRST = """
import sys
import hf_attn_plugins.indexed.hf.config
import hf_attn_plugins.indexed.hf.model
assert "transformers.pipelines" not in sys.modules
import hf_attn_plugins.star.hf.pipeline
from transformers import AutoConfig, AutoModel
from transformers.pipelines import PIPELINE_REGISTRY
assert "star-text-generation" in PIPELINE_REGISTRY.get_supported_tasks()
config = AutoConfig.for_model("character_word_encoder", hidden_size=16, num_attention_heads=2)
assert type(AutoModel.from_config(config)).__name__ == "CharacterWordEncoder"
"""


def test_our_modules_can_be_imported_before_those_of_transformers_that_they_extend():
    done = subprocess.run([sys.executable, "-c", FIRST], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )  # merges cross words and seams
    inner.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|system|>", "<|assistant|>"]
    inner.train_from_iterator(
        [TEXT] * 3, trainers.BpeTrainer(vocab_size=97, special_tokens=special, show_progress=False)
    )
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@pytest.fixture(scope="module")
def chatty(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    import copy

    other = copy.deepcopy(tokenizer)
    other.chat_template = TEMPLATE
    return other


QUESTIONS = ["Who jumps over what?", "Who jumps over the dog? ", "over", " quick", "T"]


@pytest.mark.parametrize("separator", ["\n\n", " ", ""])
def test_the_split_changes_no_token(tokenizer: Any, separator: str) -> None:
    context = (TEXT * 3).strip() + separator
    ids, queries = split_prompts(tokenizer, context, QUESTIONS, chat=False)
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1
    for question, query in zip(QUESTIONS, queries, strict=True):
        assert ids + query == tokenizer(context + question)["input_ids"] and query
    assert context.startswith(tokenizer.decode(ids, skip_special_tokens=True))
    assert len(ids) > 0.8 * len(tokenizer(context)["input_ids"])


def test_the_seam_is_where_tokens_really_change(tokenizer: Any) -> None:
    """D8: here, tokenising context and question apart gives other tokens than tokenising them together."""
    context, question = TEXT + "The quick bro", "wn fox jumps"
    ids, (query,) = split_prompts(tokenizer, context, [question], chat=False)
    first, second, joined = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, question, context + question)
    )
    assert first + second != joined and [*ids, *query][1:-1] == joined


def test_chat_templates(chatty: Any) -> None:
    ids, queries = split_prompts(chatty, TEXT + "\n\n", QUESTIONS, chat=True, system="Be quick.")
    for question, query in zip(QUESTIONS, queries, strict=True):
        messages = [{"role": "system", "content": "Be quick."}, {"role": "user", "content": TEXT + "\n\n" + question}]
        text = chatty.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = chatty(text, add_special_tokens=False)["input_ids"]
        assert ids + query == whole and whole.count(chatty.bos_token_id) == 1
        assert query[-1] == chatty.convert_tokens_to_ids("<|assistant|>")
    with pytest.raises(ValueError, match="chat template"):
        split_prompts(chatty, TEXT, QUESTIONS, chat=False, system="Be quick.")


@pytest.mark.parametrize(("together", "halo"), [(1, 0), (3, 0), (3, 20)])
def test_answers_are_those_of_the_masked_forward(chatty: Any, together: int, halo: int) -> None:
    register_pipeline()
    register_pipeline()
    model = tiny("llama")
    pipe = pipeline(TASK, model=model, tokenizer=chatty)
    sizes = {"block_size": 16, "anchor_size": 8, "halo_size": halo}
    options = {**sizes, "max_new_tokens": 5, "do_sample": False, "together": together}
    got = pipe(TEXT * 2, questions=QUESTIONS, **options)["answers"]
    context, queries = split_prompts(chatty, TEXT * 2 + "\n\n", QUESTIONS, chat=True)
    for answer, query in zip(got, queries, strict=True):
        ids, new = torch.tensor([context + query]), []
        while len(new) < 5 and (not new or new[-1] != 2):
            logits = oracle(model, ids, Plan(ids.shape[1], 16, 8, ids.shape[1] - len(context), halo))
            new.append(int(logits[0, -1].argmax()))
            ids = torch.cat([ids, torch.tensor([new[-1:]])], 1)
        assert answer == chatty.decode(new, skip_special_tokens=True)
    one = pipe(TEXT * 2, question=QUESTIONS[0], **options)
    assert one == {"answer": got[0]}


def test_user_errors(chatty: Any) -> None:
    register_pipeline()
    pipe = pipeline(TASK, model=tiny("llama"), tokenizer=chatty)
    with pytest.raises(ValueError, match="nothing was asked"):
        pipe(TEXT)
    with pytest.raises(ValueError, match="not both"):
        pipe(TEXT, question="a", questions=["b"])
