"""What the ranks do in the tests of saved conversations."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

import hf_attn_plugins as hap
from tests.parallel.cases import one_process
from tests.parallel.models import build, prompt

ARGUMENTS = dict(max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
STAR = dict(block_size=5, anchor_size=3, query_size=4)


def grown(mask: torch.Tensor, length: int) -> torch.Tensor:
    """The mask (B, length) of a conversation whose first tokens have `mask`."""
    return torch.cat([mask, mask.new_ones(len(mask), length - mask.shape[1])], 1)


def start(rank: int, size: int, folder: str, family: str = "llama", side: str = "left") -> list[list[int]]:
    """A first turn, saved; its tokens."""
    model, first = build(family), prompt(length=23, batch=2, padding=4, side=side)
    with hap.context_parallel(model, "star_attention", timeout=30, **STAR) as cp:
        one = model.generate(**first, past_key_values=DynamicCache(), **ARGUMENTS)
        mask = grown(first["attention_mask"], one.sequences.shape[1])
        cp.save(one.past_key_values, folder, one.sequences, attention_mask=mask)
    return one.sequences.tolist()


def go_on(
    rank: int, size: int, folder: str, family: str = "llama", also: str | None = None, sample: bool = False
) -> dict[str, Any]:
    """A second turn behind a folder; saved again where `also` names a second one."""
    model, second = build(family), prompt(length=9, batch=2, seed=1)["input_ids"]
    with hap.context_parallel(model, "star_attention", timeout=30, min_turn=4, **STAR) as cp:
        saved = cp.load(folder)
        loads, held = getattr(saved.cache, "loads", None), cp.group.size
        ids = torch.cat([saved.input_ids, second], 1)
        mask = grown(saved.attention_mask, ids.shape[1])
        arguments = ARGUMENTS | ({"do_sample": True, "top_k": 20} if sample else {})
        two = model.generate(input_ids=ids, attention_mask=mask, past_key_values=saved.cache, **arguments)
        if also is not None:
            cp.save(two.past_key_values, also, two.sequences, attention_mask=grown(mask, two.sequences.shape[1]))
    return {"tokens": two.sequences.tolist(), "loads": loads, "size": held}


def whole(family: str = "llama", side: str = "left") -> torch.Tensor:
    """Both turns in this process, nothing saved: the reference."""
    model, first = build(family), prompt(length=23, batch=2, padding=4, side=side)
    second = prompt(length=9, batch=2, seed=1)["input_ids"]
    with one_process(model, "star_attention", STAR):
        one = model.generate(**first, past_key_values=DynamicCache(), **ARGUMENTS)
        ids = torch.cat([one.sequences, second], 1)
        mask = grown(first["attention_mask"], ids.shape[1])
        two = model.generate(input_ids=ids, attention_mask=mask, past_key_values=one.past_key_values, **ARGUMENTS)
    return two.sequences


def refused(rank: int, size: int, folder: str) -> str:
    """The error of a load, on this rank; the group goes on."""
    model = build("llama")
    with hap.context_parallel(model, "tiled_attention", timeout=30) as cp:
        try:
            cp.load(folder)
        except (OSError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return "nothing"
