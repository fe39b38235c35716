"""Many questions over one text: the text is encoded once, block by block, and each question reads the cache.

A second run with the same `--cache FOLDER` reads the cache from disk and encodes nothing.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_attn_plugins as hap

TEXT = (
    "The ferry to the island of Orla leaves the harbour at nine in the morning and costs four coins. "
    "The last boat back leaves at six in the evening. "
    "On the island there is one inn, the Grey Heron, which is kept by Marta Lindqvist. "
    "The lighthouse was built in 1871 and is open on Sundays only. "
)


def main(argv: list[str] | None = None) -> list[str]:
    """Ask; the answers in the order of the questions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", nargs="*", default=["What does the ferry cost?", "Who keeps the inn?"])
    parser.add_argument("--model", help="folder or hub id; the small real model by default")
    parser.add_argument("--dtype", default="float32", help="bfloat16 on a GPU, or on a CPU with AVX512-BF16 or AMX")
    parser.add_argument("--text", type=Path, help="UTF-8 text; a few sentences about an island by default")
    parser.add_argument("--cache", type=Path, help="folder to keep the encoded text in")
    parser.add_argument("--block-size", type=int, help="tokens of a block; by length if not given")
    parser.add_argument("--halo-size", type=int, help="tokens just before a block that it also sees; 0 if not given")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    arguments = parser.parse_args(argv)

    path = arguments.model or hap.demo_folder()
    tokenizer = AutoTokenizer.from_pretrained(path)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=arguments.dtype)
    text = arguments.text.read_text(encoding="utf-8") if arguments.text else TEXT

    # Context and question are tokenised together and then cut: tokens do not always end where a text ends.
    chat = tokenizer.chat_template is not None
    context_ids, question_ids = hap.star.split_prompts(tokenizer, text + "\n\n", arguments.questions, chat=chat)

    start = time.perf_counter()
    cache = hap.star.encode(  # with a folder: blocks are written there, and what is there already is read
        model, context_ids, block_size=arguments.block_size, halo_size=arguments.halo_size, resume=arguments.cache
    )
    print(f"{len(context_ids)} tokens encoded or read in {time.perf_counter() - start:.1f} s")

    answers = []
    for question, ids in zip(arguments.questions, question_ids):
        start = time.perf_counter()
        new = hap.star.ask(model, cache, [ids], max_new_tokens=arguments.max_new_tokens, do_sample=False)[0]
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
        print(f"{question}\n  {answers[-1]}   ({time.perf_counter() - start:.1f} s)")
    return answers


if __name__ == "__main__":
    main()
