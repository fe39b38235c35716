"""`tune`: the order of heads against planted and exact ones, targets that are met, and what is stored and refused."""

from __future__ import annotations

import copy
import json
import math
import statistics

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_attn_plugins as hap
from hf_attn_plugins.hf.tuning.heads import listed, losses, order_of, sampled
from hf_attn_plugins.hf.tuning.measuring import Measuring, Point
from hf_attn_plugins.hf.tuning.report import front_of, read_options
from hf_attn_plugins.hf.tuning.search import Search
from hf_attn_plugins.star.options import StarOptions
from tests.star.families import CONFIGS, VOCABULARY

LENGTH = 512
IDS = torch.randint(3, VOCABULARY, (3 * LENGTH,), generator=torch.Generator().manual_seed(0))


def tiny(family: str):
    """A model whose attention is sharp enough to lose something where it is hidden."""
    torch.manual_seed(0)
    config = CONFIGS[family]()
    for name in ("max_position_embeddings", "n_positions"):
        if hasattr(config, name):
            setattr(config, name, LENGTH)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "attn" in name:
                weight *= 12
    return model


@pytest.fixture(scope="module")
def llama():
    return tiny("llama")


def silence(model, kept):
    """Let only one key head's queries reach the residual stream (8 numbers a head, two heads a key head)."""
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            weight = layer.self_attn.o_proj.weight
            for head in range(2):
                if (index, head) != kept:
                    weight[:, 16 * head : 16 * (head + 1)] = 0


@pytest.mark.parametrize("kept", [(0, 1), (2, 0)])
def test_only_the_head_that_is_heard_loses_something(llama, kept):
    model = copy.deepcopy(llama)
    silence(model, kept)
    found = losses(model, lambda: model(IDS[None, :LENGTH]), "star_attention", StarOptions(16, 4, 8, 16))
    assert {(layer, head) for layer, row in found.items() for head, loss in enumerate(row) if loss > 0} == {kept}
    assert order_of(found)[0] == kept


def test_losses_by_hand(llama):
    """Of the first layer: its input is the embedding, so both attentions can be written out."""
    model, ids = llama, IDS[None, :200]
    options = StarOptions(32, 4, 8, 40)
    found = losses(model, lambda: model(ids), "star_attention", options)
    layer = model.model.layers[0]
    states = model.model.embed_tokens(ids)
    hidden = layer.input_layernorm(states)
    cos, sin = model.model.rotary_emb(states, torch.arange(200)[None])
    query, key, value = (
        getattr(layer.self_attn, f"{name}_proj")(hidden).unflatten(-1, (-1, 8)).transpose(1, 2) for name in "qkv"
    )

    def turned(x):
        half = torch.cat([-x[..., 4:], x[..., :4]], -1)
        return x * cos[:, None] + half * sin[:, None]

    scores = turned(query) @ turned(key).repeat_interleave(2, 1).transpose(-1, -2) / math.sqrt(8)
    plan = options.plan_of(200)
    seen = torch.tensor([[plan.may_attend(i, j) for j in range(200)] for i in range(200)])
    causal = torch.ones(200, 200).tril().bool()
    dense, star = (
        scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value.repeat_interleave(2, 1) for mask in (causal, seen)
    )
    for head in range(2):
        lost = (dense - star)[:, 2 * head : 2 * head + 2].transpose(1, 2).flatten(2)
        moved = lost @ layer.self_attn.o_proj.weight[:, 16 * head : 16 * head + 16].T
        share = moved.norm(dim=-1) / states.norm(dim=-1)
        assert found[0][head] == pytest.approx(float(share.square().mean()), rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_a_share_is_kept_and_the_options_are_stored(family, tmp_path):
    model = tiny(family)
    before = model.config._attn_implementation
    found = hap.tune(model, "star_attention", length=LENGTH, max_share=0.75, text=IDS, rounds=1, exact_heads=True)
    assert found.share <= 0.75 and len(found.kl) == 2 and len(found.speedups) == 1
    assert model.config._attn_implementation == before
    assert model.config.hf_attn_plugins["star_attention"] == found.options
    shares, kls, _ = zip(*found.front, strict=True)
    assert list(shares) == sorted(shares) and list(kls) == sorted(kls, reverse=True)
    assert found.heads["rank correlation with the exact order"] > 0.3
    found.save(tmp_path / "report.json")
    assert read_options(tmp_path / "report.json") == ("star_attention", found.options)
    model.save_pretrained(tmp_path / "model")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="star_attention")
    with hap.trace(again) as seen, torch.no_grad():
        again(IDS[None, :LENGTH])
    assert seen.share == pytest.approx(found.share, abs=1e-6)
    assert found.line.startswith('hap.configure(model, "star_attention", block_size=')


def test_a_kernel_that_a_user_named_stays_and_older_sizes_go(llama):
    model = copy.deepcopy(llama)
    hap.configure(model, "star_attention", kernel="aten", preset="paper", query_size=5)
    found = hap.tune(model, length=LENGTH, max_share=0.75, text=IDS, rounds=1)
    assert model.config.hf_attn_plugins["star_attention"] == {**found.options, "kernel": "aten"}


def test_a_smaller_kl_takes_more_pairs(llama):
    tried = hap.tune(copy.deepcopy(llama), length=LENGTH, max_share=0.75, text=IDS, rounds=1).front
    kls = [kl for _, kl, _ in tried]
    wide, narrow = (
        hap.tune(copy.deepcopy(llama), length=LENGTH, max_kl=1.01 * kl, text=IDS, rounds=1)
        for kl in (max(kls), min(kls))
    )
    assert wide.share < narrow.share < 1
    for report, kl in ((wide, max(kls)), (narrow, min(kls))):
        assert next(each for _, each, options in report.front if options == report.options) <= 1.01 * kl


class Clock(Measuring):
    """Seconds that bend with the share, 3 % of noise between rounds, and a KL that falls with the share."""

    def __init__(self, a, b):
        self.a, self.b, self.noise = a, b, 0

    def point(self, options, texts=(0,)):
        plan = StarOptions(**{**options, "dense_heads": None}).plan_of(8192)
        sparse = plan.attended_pairs() / plan.causal_pairs()
        heads = sum(map(len, options.get("dense_heads") or ()))
        share = sparse + (1 - sparse) * heads / 90
        return Point(dict(options), share, (1 - share,))

    def interleaved(self, options, rounds):
        share = self.point(options).share
        self.noise += 1
        seconds = self.a + self.b * share + 0.05 * share * (1 - share)
        return [1 / (seconds * (1 + 0.03 * (-1) ** (self.noise + index))) for index in range(rounds)]


@pytest.mark.parametrize("speedup", [2.0, 2.5, 3.0])
@pytest.mark.parametrize("rounds", [1, 3, 4])
def test_a_speed_is_met_although_the_first_guess_is_off(speedup, rounds):
    order = [(layer, head) for layer in range(30) for head in range(3)]
    best, ratios = Search(Clock(0.25, 0.28), order, 90, 8192, lambda what: None).at_speed(speedup, rounds)
    assert 1 <= statistics.median(ratios) / speedup <= 1.08
    assert best.share > 0.1


def test_speeds_out_of_reach_say_what_is_in_reach():
    def search():
        return Search(Clock(0.25, 0.28), [(0, 0)], 90, 8192, lambda what: None)

    with pytest.raises(ValueError, match=r"the sparsest plan that is tried gives 3\.\d\dx"):
        search().at_speed(5.0, 2)
    with pytest.raises(ValueError, match=r"tiled_attention, which is exact.*1\.89x"):
        search().at_speed(1.5, 2)
    with pytest.raises(ValueError, match=r"sparsest plan"):
        search().at_share(0.01)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "one target is needed"),
        ({"max_kl": 0.1, "max_share": 0.5}, "one target is needed"),
        ({"max_share": 1.5}, "below 1"),
        ({"max_kl": -1}, "above 0"),
        ({"max_share": 0.5, "length": 100}, "256"),
        ({"max_share": 0.5, "text": IDS[:600]}, "at least 1024"),
        ({"max_share": 0.5, "text": None}, "tokenizer"),
        ({"max_share": 0.5, "name": "tiled_attention"}, "nothing to tune"),
        ({"max_kl": 1e-12}, "a KL of"),
    ],
)
def test_what_is_refused_leaves_the_model_as_it_was(llama, given, said):
    before = copy.deepcopy(getattr(llama.config, "hf_attn_plugins", None))
    with pytest.raises(ValueError, match=said):
        hap.tune(llama, **{"length": LENGTH, "text": IDS, "rounds": 1, **given})
    assert getattr(llama.config, "hf_attn_plugins", None) == before


def test_reports_of_another_kind_are_refused(tmp_path):
    path = tmp_path / "report.json"
    for content in ("", "[]", "{}", json.dumps({"kind": "hf-attn tune", "plugin": "star_attention", "options": 3})):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"report\.json"):
            read_options(path)
    path.write_text(
        json.dumps({"kind": "hf-attn tune", "plugin": "star_attention", "options": {"block_size": "large"}})
    )
    with pytest.raises(ValueError, match="block_size"):
        read_options(path)


def test_positions_and_lists():
    assert sampled(10, 20).tolist() == list(range(10))
    assert sampled(1000, 4).tolist() == [125, 375, 625, 875]
    assert listed([]) is None and listed([(2, 1), (0, 3), (2, 0)]) == [[3], [], [0, 1]]
    assert front_of([]) == ()


def test_several_texts_are_searched_and_none_of_them_is_reported(llama, monkeypatch):
    asked = []
    real = Measuring.point

    def point(self, options, texts=(0,)):
        asked.append(tuple(texts))
        return real(self, options, texts)

    monkeypatch.setattr(Measuring, "point", point)
    text = torch.randint(3, VOCABULARY, (5 * LENGTH,), generator=torch.Generator().manual_seed(1))
    found = hap.tune(copy.deepcopy(llama), length=LENGTH, max_share=0.75, text=text, rounds=1)
    assert set(asked[:-1]) == {(0, 1)} and asked[-1] == (2, 3, 4) and len(found.kl) == 3
