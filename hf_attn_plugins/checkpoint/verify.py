"""Compare a patched model's logits with the original's by the error rule, on random and on real tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.testing import closeness


def samples(folder: Path, vocabulary: int, text: str | None, length: int = 128) -> dict[str, Tensor]:
    """(1, T) token ids to compare on: random ones, and real ones where the folder has a tokenizer that loads.

    Args:
        text: what to tokenize; None takes prose that CPython ships.
    """
    found = {"random": torch.randint(0, vocabulary, (1, length), generator=torch.Generator().manual_seed(1))}
    if any(folder.glob("tokenizer*")) or (folder / "vocab.json").exists():
        from transformers import AutoTokenizer

        if text is None:
            from pydoc_data.topics import topics

            text = topics["assignment"]
        ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"][:, :length]
        if ids.numel() and int(ids.max()) < vocabulary:
            found["real"] = ids
    return found


@torch.no_grad()
def compare(original: Any, patched: Any, ids: Mapping[str, Tensor]) -> list[str]:
    """Logits of both models on each sample; raises unless the error rule holds.

    The reference is the original in float64, or in float32 for half-precision weights.

    Returns:
        a line per sample.

    Raises:
        ValueError: the patched model's logits are further from the reference than the rule allows.
    """
    wide = torch.float64 if original.dtype == torch.float32 else torch.float32
    reference = copy.deepcopy(original).to(wide)
    lines = []
    for name, sample in ids.items():
        ref, low, out = (model(sample, use_cache=False).logits for model in (reference, original, patched))
        wrong = closeness(out, low, ref.to(wide))
        if wrong is not None:
            raise ValueError(f"verification failed: logits on {name} tokens: {wrong}.")
        same = (out.argmax(-1) == low.argmax(-1)).float().mean().item()
        worst = (out - low).abs().max().item()
        lines.append(f"verified on {sample.shape[1]} {name} tokens: max |dlogit| {worst:.1e}, top-1 equal {same:.1%}.")
    return lines
