"""Packed rows on shards beside one process: logits, and which columns a rank returns."""

from __future__ import annotations

from typing import Any

import torch

import hf_attn_plugins as hap
from tests.parallel.cases import one_process
from tests.parallel.cqs_cases import error_of
from tests.parallel.models import build, prompt


def logits(rank: int, size: int, options: dict[str, Any], family: str = "llama") -> dict[str, Any]:
    """Errors of star's logits for texts of 11, 1 and 17 tokens and of 3, 17 and 9, and the columns in training."""
    model, name = build(family).eval(), "star_attention"
    places = [[*range(11), 0, *range(17)], [*range(3), *range(17), *range(9)]]
    given: dict[str, Any] = {
        "input_ids": prompt(29, 2)["input_ids"], "position_ids": torch.tensor(places), "use_cache": False,
    }  # fmt: skip
    embedded = {**given, "inputs_embeds": model.get_input_embeddings()(given["input_ids"]).detach()}
    del embedded["input_ids"]
    with one_process(model, name, options), torch.no_grad():
        wanted = model(**given).logits
    with hap.context_parallel(model, name, timeout=30, **options) as cp:
        with torch.no_grad():
            found = {
                "all": (model(**given).logits, wanted),
                "embeddings": (model(**embedded).logits, wanted),
                "last 4": (model(**given, logits_to_keep=4).logits, wanted[:, -4:]),
            }
        seen = None if cp.columns is None else cp.columns.shape
        model.train()
        mine = model(**given).logits.detach()
        columns = torch.arange(29).expand(2, -1) if cp.columns is None else cp.columns
    rows = torch.arange(2)[:, None].expand_as(columns)
    real = columns >= 0
    found["training"] = (mine[real], wanted[rows[real], columns[real]])
    errors = {what: error_of(x, y) for what, (x, y) in found.items()}
    return {
        "errors": errors,
        "columns": list(zip(rows[real].tolist(), columns[real].tolist(), strict=True)),
        "seen": seen,
    }
