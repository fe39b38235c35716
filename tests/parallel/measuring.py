"""What ranks count, for the tests to compare with formulas."""

from __future__ import annotations

from typing import Any

import torch

import hf_attn_plugins as hap
from tests.parallel.models import build, prompt


def measured(
    rank: int, size: int, *, name: str, options: dict[str, Any], length: int, new: int, dtype: str
) -> dict[str, Any]:
    """One prompt, `new` tokens: traffic, cache and prefill of this rank."""
    model = build("llama", dtype)
    with hap.context_parallel(model, name, timeout=30, **options) as cp:
        output = model.generate(
            **prompt(length=length, batch=1), max_new_tokens=new, min_new_tokens=new, do_sample=False
        )
        return {
            "traffic": cp.traffic().as_dict(),
            "cache": cp.cache_bytes,
            "prefill": cp.prefill_tokens,
            "loads": cp.loads,
            "summary": cp.summary(),
            "made": output.shape[1] - length,
        }


def exchanges(rank: int, size: int) -> dict[str, Any]:
    """Every exchange of a group once, on ragged shards, forward and backward."""
    from hf_attn_plugins.core.partial import Partial
    from hf_attn_plugins.parallel import Group

    group = Group.join(20)
    generator = torch.Generator().manual_seed(0)  # the same numbers on all ranks: everyone knows what must arrive
    sizes = [2 * other + (other == 1) for other in range(size)]
    shards = [torch.randn(3, n, 2, generator=generator, dtype=torch.float64) for n in sizes]
    own = shards[rank].clone().requires_grad_()
    gathered = group.all_gather(own, sizes, 1)
    right = all(torch.equal(a, b) for a, b in zip(gathered, shards, strict=True))
    weights = [torch.randn(3, sum(sizes), 2, generator=generator, dtype=torch.float64) for _ in range(size)]
    (torch.cat(gathered, 1) * weights[rank]).sum().backward()
    start = sum(sizes[:rank])
    expected = sum(weights)[:, start : start + sizes[rank]]
    report = {"all_gather": right, "all_gather backward": torch.allclose(own.grad, expected)}

    pieces = [[torch.randn(i + j, 3, generator=generator) for j in range(size)] for i in range(size)]
    got = group.all_to_all(pieces[rank], [(i + rank, 3) for i in range(size)])
    report["all_to_all"] = all(torch.equal(got[i], pieces[i][rank]) for i in range(size))
    report["bytes"] = group.traffic["exchange"].sent

    partials = [
        Partial(
            torch.randn(1, 2, 3, 5, generator=generator).bfloat16(),
            torch.randn(1, 2, 3, generator=generator).masked_fill(
                torch.rand(1, 2, 3, generator=generator) < 0.3, -torch.inf
            ),
        )
        for _ in range(size)
    ]
    found = group.gather_partials(partials[rank])
    report["partials"] = all(
        torch.equal(a.out, b.out) and torch.equal(a.lse, b.lse) for a, b in zip(found, partials, strict=True)
    )
    report["merge bytes"] = group.traffic["merge"].sent
    report["broadcast"] = [int(group.broadcast(torch.full((2,), rank), source)[0]) for source in range(size)]
    filled = torch.zeros(size, 3, dtype=torch.float64)
    filled[rank] = -1.5 * (rank + 1)
    collected = group.collect(filled)
    report["collect"] = bool((collected == -1.5 * torch.arange(1, size + 1).unsqueeze(1)).all())
    report["objects"] = group.objects({"rank": rank, "text": "x" * rank})
    group.leave()
    try:
        group.objects(1)
        report["left"] = size == 1
    except RuntimeError as error:
        report["left"] = "was left" in str(error)
    return report
