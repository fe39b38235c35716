"""Tiny models for the tests on several ranks: attention sharp enough to show a lost key, and never saturated."""

from __future__ import annotations

from typing import Any

import torch

from tests import families

_BUILT: dict[tuple[str, str], Any] = {}


def build(family: str, dtype: str = "float64") -> Any:
    """The model `family`, built once in a process."""
    if (family, dtype) not in _BUILT:
        model = families.build(family, getattr(torch, dtype))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if any(part in name for part in ("q_proj", "k_proj")):
                    parameter.mul_(0.5)
                if any(part in name for part in ("v_proj", "o_proj")):
                    parameter.mul_(6.0)  # what attention found decides the logits
        model.generation_config.pad_token_id = 0
        _BUILT[family, dtype] = model
    return _BUILT[family, dtype]


def prompt(length: int, batch: int, padding: int = 0, side: str = "left", seed: int = 0) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask; row i is padded by i times `padding` tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, families.VOCAB, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(batch):
        hidden = slice(0, row * padding) if side == "left" else slice(length - row * padding, length)
        ids[row, hidden], mask[row, hidden] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}
