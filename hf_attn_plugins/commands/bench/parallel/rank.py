"""One rank of `hf-attn bench parallel`: a launched process that runs prompts and writes what it measured to a file.

python -m torch.distributed.run --standalone --nproc-per-node 4 \\
    -m hf_attn_plugins.commands.bench.parallel.rank CASES.json
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins import kernels
from hf_attn_plugins.bench.peak_memory import PeakMemory
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.core.rectangle import Rectangles, per_batch
from hf_attn_plugins.cqs import workers
from hf_attn_plugins.hf.compat import cache_keyword, returned_cache
from hf_attn_plugins.kernels import bound_attend as bound
from hf_attn_plugins.kernels.attend_rectangles import sub_mask
from hf_attn_plugins.parallel import star
from hf_attn_plugins.parallel.costs import EXCHANGES
from hf_attn_plugins.parallel.hf.context_parallel import context_parallel

STEP = 512  # rows of the mask that are evaluated at a time


def main(path: Path) -> None:
    """Run the cases in the file; write `rank-N.json` beside it, with bytes, pairs, rows, cache and memory per case."""
    reports = [run_case(case) for case in json.loads(path.read_text(encoding="utf-8"))]
    path.with_name(f"rank-{reports[0].pop('rank')}.json").write_text(json.dumps(reports), encoding="utf-8")


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """The measured figures of one prompt through one method."""
    model = tiny_model(case)
    tokens = torch.randint(0, model.config.vocab_size, (1, case["length"]), generator=torch.Generator().manual_seed(0))
    with context_parallel(model, case["name"], timeout=300, **case["options"]) as cp, torch.no_grad():
        model(
            tokens[:, : max(64, 8 * cp.size)], logits_to_keep=1
        )  # warm-up: the first call loads code and allocates memory
        cp.traffic().reset()
        pairs = Pairs()
        with PeakMemory(cp.group.device) as memory, pairs.counted():
            cache = returned_cache(model(tokens, logits_to_keep=1))
        traffic = cp.traffic().as_dict()
        report: dict[str, Any] = {
            "rank": cp.rank,
            "sent": sum(traffic[what]["sent"] for what in EXCHANGES if what in traffic),
            "received": sum(traffic[what]["received"] for what in EXCHANGES if what in traffic),
            "cache": cp.cache_bytes,
            "rows": cp.prefill_tokens,
            "pairs": pairs.seen // (case["heads"] * case["layers"]) * case["layers"],
            "peak": memory.bytes,
        }
        cp.traffic().reset()
        model(tokens[:, :1], logits_to_keep=1, **{cache_keyword(model): cache})
        report["decode"] = cp.traffic()["merge"].received
    return report


def tiny_model(case: dict[str, Any]) -> Any:
    """A random Llama of the case's sizes, the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=case["heads"] * case["head_dim"],
        intermediate_size=case["heads"] * case["head_dim"],
        num_attention_heads=case["heads"],
        num_key_value_heads=case["kv_heads"],
        head_dim=case["head_dim"],
        num_hidden_layers=case["layers"],
        vocab_size=256,
        max_position_embeddings=case["length"] + 8,
    )
    return LlamaForCausalLM(config).eval().to(getattr(torch, case["dtype"]))


class Pairs:
    """Counts the (query, key) pairs that kernels compute, from the masks that they are called with.

    Attributes:
        seen: pairs, summed over query heads.
    """

    def __init__(self) -> None:
        self.seen = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count every kernel call inside the block."""
        bound.attend, workers.attend = self._attend, self._attend  # type: ignore[assignment]
        star.attend_rectangles = self._attend_rectangles  # type: ignore[assignment]
        try:
            yield
        finally:
            bound.attend, workers.attend = kernels.attend, kernels.attend
            star.attend_rectangles = kernels.attend_rectangles

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, mask: Mask | None = None, **options: Any
    ) -> Partial:
        self.seen += query.shape[1] * visible_pairs(mask or Mask(), query.shape[2], key.shape[2])
        return kernels.attend(query, key, value, mask=mask, **options)

    def _attend_rectangles(
        self, query: Tensor, key: Tensor, value: Tensor, plan: Rectangles, *, mask: Mask, **options: Any
    ) -> Partial:
        for row_begin, row_end, key_begin, key_end, _, shift in per_batch(plan)[0]:
            part = sub_mask(mask, slice(row_begin, row_end), slice(key_begin, key_end), shift)
            self.seen += query.shape[1] * visible_pairs(part, row_end - row_begin, key_end - key_begin)
        return kernels.attend_rectangles(query, key, value, plan, mask=mask, **options)


def visible_pairs(mask: Mask, num_rows: int, num_keys: int) -> int:
    """Visible (query, key) pairs of the first batch row, found by evaluating the mask for every pair."""
    start, keys = mask.start(num_rows, num_keys), torch.arange(num_keys)
    visible = 0
    for first in range(0, num_rows, STEP):
        rows = torch.arange(first, min(first + STEP, num_rows))
        visible += int(mask.visible(rows, keys, start)[0, 0].expand(len(rows), num_keys).sum())
    return visible


if __name__ == "__main__":
    main(Path(sys.argv[1]))
