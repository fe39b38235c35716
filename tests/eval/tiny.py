"""A tiny random model with a tokenizer trained on Python's own documentation, as a folder: nothing is downloaded."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tests.families import llama

CHAT = (
    "{% for m in messages %}<|user|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>"]
VOCABULARY = 2000
POSITIONS = 2048


@functools.cache
def bpe() -> str:
    """A byte-level BPE of 2000 tokens, as JSON."""
    from pydoc_data.topics import topics

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(list(topics.values())[:20], trainer)
    return tokenizer.to_str()


def tokenizer(*, chat: bool = True, bos: bool = False) -> Any:
    """A tokenizer with or without a chat template, with or without a BOS that it puts in front."""
    inner = Tokenizer.from_str(bpe())
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", bos_token="<s>" if bos else None)
    if chat:
        made.chat_template = CHAT
    return made


def model_folder(folder: Path, **kind: bool) -> Path:
    """A two-layer random Llama of 2048 positions and its tokenizer, saved."""
    torch.manual_seed(0)
    model = llama(vocab_size=VOCABULARY, max_position_embeddings=POSITIONS, bos_token_id=None, eos_token_id=1)
    model.to(torch.float32).save_pretrained(folder)
    tokenizer(**kind).save_pretrained(folder)
    return folder


def jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as a JSON-lines file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
