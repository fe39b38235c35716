"""The scan's shrinker keeps what a config owes to itself; a sample of families agrees with its default backend."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import transformers as hf

from hf_attn_plugins.hf.scan import oracle, pool, report, runs, trial
from hf_attn_plugins.hf.scan.families import KINDS, Family, families
from hf_attn_plugins.hf.scan.tiny import shrink, sizes, weights
from hf_attn_plugins.hf.scan.tiny.inputs import Inputs
from tests.older import OLDER

SAMPLE = (
    "afmoe",
    "albert",
    "altclip",
    "apertus",
    "arcee",
    "audio-spectrogram-transformer",
    "bart",
    "beit",
    "bert",
    "biogpt",
    "bitnet",
    "clip_vision_model",
    "cohere",
    "convnext",
    "gemma2",
    "gpt2",
    "gpt_oss",
    "granite",
    "hubert",
    "llama",
    "mistral",
    "modernbert",
    "olmo2",
    "phi3",
    "qwen3",
    "starcoder2",
    "t5",
    "vit",
    "wav2vec2",
    "whisper",
)


@functools.cache
def known() -> dict[str, Family]:
    return {family.name: family for family in families()}


def test_every_kind_of_model_is_among_the_families() -> None:
    found = known()
    assert len(found) >= 260
    assert {family.kind for family in found.values()} <= set(KINDS)
    assert (found["llama"].kind, found["bert"].kind, found["t5"].kind) == ("causal", "masked", "seq2seq")


@pytest.mark.parametrize("in_place", [False, True])
def test_a_shrunken_config_keeps_its_relations(in_place: bool) -> None:
    config = hf.Qwen3Config(num_hidden_layers=24, max_window_layers=12, use_sliding_window=True)
    small = shrink.shrunk(config, in_place)
    assert (config.hidden_size, config.num_hidden_layers) == (4096, 24), "the given config is left alone"
    assert small.hidden_size % small.num_attention_heads == 0
    assert small.num_attention_heads % small.num_key_value_heads == 0
    assert len(small.layer_types) == small.num_hidden_layers
    assert set(small.layer_types) == set(config.layer_types), "one layer of every kind is kept"


def test_shrunken_tokens_fit_the_vocabulary_and_stay_distinct() -> None:
    small = shrink.shrunk(hf.Qwen2VLConfig(), in_place=True)  # before 5.4 this class takes no text config that is built
    special = [small.image_token_id, small.video_token_id, small.vision_start_token_id]
    assert len(set(special)) == 3 and all(0 <= each < small.text_config.vocab_size for each in special)


def test_towers_still_meet() -> None:
    small = shrink.shrunk(hf.LlavaConfig())
    assert small.vision_config.image_size % small.vision_config.patch_size == 0
    assert max(small.vision_config.hidden_size, small.text_config.hidden_size) <= sizes.WIDTH


def test_the_oracle_is_the_definition_of_star() -> None:
    mask = oracle.star_mask(torch.zeros(1, 8, dtype=torch.long), block_size=3, anchor_size=1, query_size=2)[0, 0] == 0
    want = ["10000000", "11000000", "11100000", "10010000", "10011000", "10011100", "11111110", "11111111"]
    assert ["".join("01"[int(x)] for x in row) for row in mask] == want


def test_differences_are_found_and_rounding_is_not_one() -> None:
    base = {"logits": torch.tensor([[1.0, -4.0]]), "step 0": torch.tensor([[0.0, 1.0]])}
    assert runs.difference(base, {k: v.clone() for k, v in base.items()}).relative == 0
    assert runs.difference(base, {**base, "logits": torch.tensor([[1.0, -4.4]])}).relative == pytest.approx(0.1)
    assert runs.difference(base, {"logits": base["logits"]}).relative == float("inf")


def test_a_scale_that_is_off_is_far_beyond_the_tolerance() -> None:
    model, _ = trial.build(known()["llama"])
    base = trial.baseline(model, ("forward",))
    assert base.level == "sharp" and (trial.sensitivity(base) or 0) > 50


def test_perturbed_weights_are_restored() -> None:
    model = torch.nn.Linear(4, 4)
    before = model.weight.detach().clone()
    with weights.perturbed(model):
        assert not torch.equal(model.weight, before)
    assert torch.equal(model.weight, before)


def test_a_family_that_hangs_or_dies_is_recorded_and_the_rest_goes_on() -> None:
    def fake(family: Family) -> dict[str, object]:
        if family.name == "hangs":
            time.sleep(60)
        if family.name == "dies":
            os._exit(3)
        if family.name == "raises":
            raise ValueError("why")
        return {"name": family.name, "class": "", "kind": "other", "built": True, "plugins": {}}

    chosen = [Family(name, "", "other") for name in ("hangs", "dies", "raises", "runs", "done")]
    done = {"done": {"name": "done", "built": False, "plugins": {}}}
    found = pool.scan(chosen, fake, workers=2, seconds=2, results=done)
    assert found["hangs"]["why"] == "no result within 2 s"
    assert found["dies"]["why"] == "its process died"
    assert found["raises"]["why"] == "ValueError: why"
    assert found["runs"]["built"] and not found["done"]["built"]


def test_the_page_counts_and_names_failures() -> None:
    good = {"verdict": "exact", "why": ""}
    bad = {"verdict": "WRONG", "why": "forward off by 1"}
    result = {"name": "a", "class": "A", "kind": "causal", "built": True, "inputs": ["input_ids"]}
    results = {
        "a": {**result, "plugins": {"tiled_attention": good, "star_attention": bad, "cqs_attention": good}},
        "b": {"name": "b", "class": "B", "kind": "other", "built": False, "plugins": {}, "why": "no|timm"},
    }
    page = report.to_markdown(results, {"torch": "1"})
    assert "2 model types; 1 built" in page and "- `a` under `star_attention`: WRONG, forward off by 1" in page
    assert "no\\|timm" in page and report.failures(results) == [("a", "star_attention", "WRONG", "forward off by 1")]


def _passes(name: str, compiled: tuple[str, ...] = ()) -> None:
    found = pool.scan([known()[name]], functools.partial(trial.trial, compiled=compiled), seconds=120)
    assert not report.failures(found), report.failures(found)


def _compiled_under(default: float, plugin: float, forward_off: float = 0.0) -> tuple[dict, dict]:
    """What the scan makes of a plugin's graph with logits `plugin`, the default's graph having `default`."""
    truth = {"logits": torch.ones(2, 3, 4)}
    model = torch.nn.Linear(1, 1)
    model.config = hf.PreTrainedConfig(attn_implementation="sdpa")
    base = trial.Base(model, "sdpa", Inputs({}), "plain", {"forward": truth}, {"forward": 1e-3}, {})
    mine = runs.difference(truth, {"logits": truth["logits"] * plugin})
    compiled = {"off": mine.relative, "where": mine.where, "values": {"logits": truth["logits"] * plugin}}
    steps = {"forward": {"off": forward_off}, "compiled": compiled}
    with mock.patch.object(trial, "implementation", _nothing):
        trial._as_the_default_compiles(steps, base, lambda: {"logits": truth["logits"] * default})
    return steps, base.failed


@contextlib.contextmanager
def _nothing(*_: object) -> Iterator[None]:
    yield


def test_a_graph_is_judged_by_the_defaults_graph_where_that_differs_from_eager() -> None:
    steps, failed = _compiled_under(default=1.0, plugin=2.0)
    assert steps["compiled"]["off"] == pytest.approx(1.0) and not failed, "the plugin alone is off"
    steps, failed = _compiled_under(default=2.0, plugin=2.0)
    assert steps["compiled"]["off"] == 0 and "off by 1" in failed["compiled"]
    steps, failed = _compiled_under(default=2.0, plugin=3.0)
    assert steps["compiled"]["off"] > 0.1, "both are off, and not alike"
    steps, _ = _compiled_under(default=2.0, plugin=3.0, forward_off=0.5)
    assert "compiled" not in steps, "star's own numbers"


@pytest.mark.parametrize("name", SAMPLE)
def test_a_sample_agrees(name: str) -> None:
    if name not in known():
        pytest.skip("not in this Transformers")
    found = pool.scan([known()[name]], trial.trial, seconds=60)[name]
    if not found["built"] and OLDER:
        pytest.skip(f"Transformers {hf.__version__} takes no such config: {found['why']}")
    assert found["built"] and found.get("inputs"), found.get("why")
    assert not report.failures({name: found})


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted({family.name for family in families()} - set(SAMPLE)))
def test_every_family_agrees(name: str) -> None:
    _passes(name, ("tiled_attention", "star_attention", "cqs_attention"))
