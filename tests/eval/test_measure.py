"""The measurements against figures computed the plain way, from whole logits."""

from __future__ import annotations

import math

import pytest
import torch
from hf_attn_plugins.eval import measure

import hf_attn_plugins as hap
from tests.families import build

LENGTH = 300  # more than one chunk of positions


@pytest.fixture(scope="module")
def text():
    return torch.randint(5, 97, (LENGTH,), generator=torch.Generator().manual_seed(3)).tolist()


def whole(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # gemma2 caps its logits after the head
def test_losses_are_those_of_whole_logits(name, text):
    model = build(name)
    found = measure.losses(model, text, measure.hidden(model, text))
    logp = whole(model, text)
    expected = -logp[torch.arange(LENGTH - 1), torch.tensor(text[1:])]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    buckets = measure.loss_buckets(found)
    assert [b["begin"] for b in buckets[1:]] == [b["end"] for b in buckets[:-1]] and buckets[-1]["end"] == LENGTH - 1
    assert sum(b["nll_sum"] for b in buckets) == pytest.approx(float(found.sum()))
    assert sum(b["count"] for b in buckets) == LENGTH - 1


def test_agreement_is_that_of_whole_logits(text):
    model = build("llama")
    base = measure.hidden(model, text)
    p = whole(model, text)[:-1]
    with hap.use(model, "star_attention", block_size=64, anchor_size=4, query_size=8):
        other = measure.hidden(model, text)
        q = whole(model, text)[:-1]
    found = measure.agreement(model, text, base, other)
    kl = (p.exp() * (p - q)).sum(-1)
    targets = torch.tensor(text[1:])
    rows = torch.arange(LENGTH - 1)
    ratio = p[rows, targets] - q[rows, targets]
    assert found["positions"] == LENGTH - 1
    assert found["kl"]["mean"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found["kl"]["median"] == pytest.approx(float(kl.median()), rel=1e-2, abs=1e-6)
    assert found["kl"]["p99"] == pytest.approx(float(kl.quantile(0.99)), rel=1e-2)
    assert found["kl"]["max"] == pytest.approx(float(kl.max()), rel=1e-3)
    assert found["top1"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()), abs=0.011)
    assert found["log_ppl_ratio"] == pytest.approx(float(ratio.mean()), rel=1e-3)
    assert found["log_ppl_ratio_se"] == pytest.approx(float(ratio.std()) / math.sqrt(LENGTH - 1), rel=1e-3)
    difference = q[rows, targets].exp() - p[rows, targets].exp()
    assert found["rms_dp"] == pytest.approx(float(difference.square().mean().sqrt()), rel=1e-3)
    for bucket in found["buckets"]:
        part = slice(bucket["begin"], bucket["end"])
        assert bucket["kl"] == pytest.approx(float(kl[part].mean()), rel=1e-2, abs=1e-6)
        assert bucket["baseline_nll"] == pytest.approx(float(-p[rows, targets][part].mean()), rel=1e-3)
    assert found["kl"]["mean"] > 1e-3 and found["top1"] < 1.0


def test_a_backend_agrees_with_itself(text):
    model = build("llama")
    states = measure.hidden(model, text)
    found = measure.agreement(model, text, states, states)
    assert found["top1"] == 1.0 and found["kl"]["max"] == 0.0 and found["log_ppl_ratio"] == 0.0


def test_answers_are_greedy_and_timed_in_order(text):
    model = build("llama")
    found = measure.answer(model, text[:50], 12, to_the_end=True)
    ids, expected = list(text[:50]), []
    for _ in range(12):
        scores = whole(model, ids)[-1].clone()
        scores[model.generation_config.eos_token_id] = -torch.inf
        expected.append(int(scores.argmax()))
        ids.append(expected[-1])
    assert found.token_ids == expected
    seconds = found.seconds
    assert 0 < seconds["prefill"] <= seconds["first_token"] < seconds["first_token"] + seconds["decode"]
    assert seconds["first_token"] + seconds["decode"] <= seconds["total"]


def test_answers_end_at_eos_and_the_budget_holds(text):
    model = build("llama")
    first = measure.answer(model, text[:50], 1).token_ids[0]
    model.generation_config.eos_token_id = [first, 2]
    assert measure.answer(model, text[:50], 12).token_ids == [first]
    assert len(measure.answer(model, text[:50], 5, to_the_end=True).token_ids) == 5


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 1000])
def test_ranges_cover_every_position_once(length):
    found = measure.ranges(length)
    assert [i for begin, end in found for i in range(begin, end)] == list(range(length))
    assert len(found) == min(length, measure.BUCKETS)


@torch.no_grad()
def test_an_answer_is_greedy_and_single_whatever_the_generation_config_says(text):
    model = build("llama")
    expected = measure.answer(model, text[:9], 3).token_ids
    model.generation_config.update(num_beams=2, num_return_sequences=2, do_sample=True, return_dict_in_generate=True)
    assert measure.answer(model, text[:9], 3).token_ids == expected
