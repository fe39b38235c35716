"""The figures of two predictions, against sums written out in Python and PyTorch's own functions."""

from __future__ import annotations

import math

import pytest
import torch
from hf_attn_plugins.eval import measure
from torch.nn import functional

import hf_attn_plugins as hap
from hf_attn_plugins.hf import predictions
from tests.families import build


@pytest.fixture
def two():
    torch.manual_seed(0)
    base = torch.randn(3, 7, 50) * 4
    return predictions.log_probabilities(base), predictions.log_probabilities(base + torch.randn(3, 7, 50) * 0.1)


def test_divergence_is_the_sum_of_its_definition(two):
    p, q = two
    found = predictions.divergence(p, q)
    for i in range(3):
        for j in range(7):
            terms = [math.exp(a) * (a - b) for a, b in zip(p[i, j].tolist(), q[i, j].tolist(), strict=True)]
            assert float(found[i, j]) == pytest.approx(math.fsum(terms), rel=1e-12)
    torch.testing.assert_close(found, functional.kl_div(q, p, log_target=True, reduction="none").sum(-1))
    assert torch.equal(found, (p.exp() * (p - q)).sum(-1)), "bit for bit, where rounding stays above 0"
    assert torch.equal(predictions.divergence(p, p), torch.zeros(3, 7, dtype=torch.float64))


def test_first_choices_and_likelihoods(two):
    p, q = two
    chosen = [[max(range(50), key=row.__getitem__) for row in rows] for rows in p.tolist()]
    others = [[max(range(50), key=row.__getitem__) for row in rows] for rows in q.tolist()]
    assert predictions.same_first_choice(p, q).tolist() == [
        [a == b for a, b in zip(one, other, strict=True)] for one, other in zip(chosen, others, strict=True)
    ]
    tokens = torch.randint(50, (3, 7))
    assert predictions.of_tokens(p, tokens).tolist() == [
        [float(p[i, j, tokens[i, j]]) for j in range(7)] for i in range(3)
    ]


def test_compare_and_the_evaluation_give_one_number():
    """The same text through both: equal bit for bit, where both count the same positions."""
    model = build("llama")
    ids = torch.randint(5, 97, (1, 300), generator=torch.Generator().manual_seed(3))
    sizes = {"block_size": 64, "anchor_size": 4, "query_size": 8}
    seen = []

    def noted(base, other, function=predictions.divergence):
        found = function(base, other)
        seen.append(found.flatten())
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictions, "divergence", noted)
        report = hap.compare(model, ids, "star_attention", baseline="sdpa", repeats=1, **sizes)
        whole = torch.cat(seen)
        seen.clear()
        with hap.use(model, "sdpa"):
            base = measure.hidden(model, ids[0].tolist())
        with hap.use(model, "star_attention", **sizes):
            other = measure.hidden(model, ids[0].tolist())
        found = measure.agreement(model, ids[0].tolist(), base, other)
    assert report.kl_mean == float(whole.mean()) > 0
    assert torch.equal(torch.cat(seen), whole[:-1]), "the evaluation leaves out the last position: its token is unknown"
    assert found["kl"]["mean"] == float(whole[:-1].mean())
