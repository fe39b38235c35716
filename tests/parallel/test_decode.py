"""The example in the module's docstring runs, and its merge is the package's own."""

from __future__ import annotations

import doctest

import torch

from hf_attn_plugins.core.partial import Partial, merge
from hf_attn_plugins.parallel import decode


def test_the_example_of_the_merge_runs():
    result = doctest.testmod(decode)
    assert result.attempted >= 10 and result.failed == 0


def test_the_example_is_what_merge_computes_also_on_a_rank_without_keys():
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (torch.randn(n, 4, generator=generator, dtype=torch.float64) * 3 for n in (5, 12, 12))
    partials = []
    for shard in (slice(0, 7), slice(7, 7), slice(7, 12)):
        scores = query @ keys[shard].T
        out = scores.softmax(-1) @ values[shard]
        partials.append(Partial(out[None, None], scores.logsumexp(-1)[None, None]))
    expected = (query @ keys.T).softmax(-1) @ values
    assert torch.allclose(merge(partials).out[0, 0], expected, rtol=1e-12, atol=1e-12)
