"""Options as configs may hold them: bounded, known, and refused with a line that names the config."""

from __future__ import annotations

import pytest
import torch

import hf_attn_plugins as hap
from hf_attn_plugins.core.options import MOST_TOKENS
from hf_attn_plugins.cqs.options import MOST_WORKERS, CQSOptions
from hf_attn_plugins.star.options import StarOptions
from hf_attn_plugins.tiled.options import TiledOptions
from tests.families import build

IDS = torch.arange(5, 42).unsqueeze(0)
BAD = {
    "more workers than there may be": ("cqs_attention", {"workers": 2000, "min_length": 1}, "at most 1024"),
    "a thousand million workers": ("cqs_attention", {"workers": 10**9}, "config .*workers=1000000000: at most"),
    "an unknown option": ("cqs_attention", {"wrkers": 2}, "config .*LlamaConfig.* unknown option 'wrkers': it takes"),
    "an option that is no text": ("cqs_attention", {3: 2}, "unknown option 3"),
    "options as number": ("cqs_attention", 5, "config .* is 5: a mapping"),
    "options as list": ("star_attention", ["block_size"], "a mapping of options"),
    "a block without end": ("star_attention", {"block_size": 10**30}, "block_size=1000.* at most"),
    "a block of text": ("star_attention", {"block_size": "8"}, "block_size='8'"),
    "a kernel that is no name": ("tiled_attention", {"kernel": []}, r"kernel=\[\] is unknown"),
    "a set that is no list": ("cqs_attention", {"workers": 7, "interest_set": 5}, "interest_set=5: a list"),
    "min_length nothing": ("cqs_attention", {"min_length": None}, "min_length=None"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_a_config_may_not_hold(case):
    name, stored, message = BAD[case]
    model = build("llama")
    model.config.hf_attn_plugins = {name: stored}
    model.set_attn_implementation(name)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(IDS)


def test_as_many_workers_as_tokens_do():
    model = build("llama")
    with torch.no_grad():
        expected = model(IDS).logits
        with hap.use(model, "cqs_attention", workers=37, min_length=1):
            torch.testing.assert_close(model(IDS).logits, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("stored", [[1], "star", 3])
def test_no_mapping_at_all(stored):
    model = build("llama")
    model.config.hf_attn_plugins = stored
    for work in (lambda: model(IDS), lambda: hap.configure(model, "star_attention", block_size=8)):
        model.set_attn_implementation("star_attention")
        with pytest.raises(ValueError, match="mapping of plugin names"):
            work()


def test_the_bounds_themselves_are_allowed():
    assert CQSOptions(workers=MOST_WORKERS, min_length=MOST_TOKENS).workers == MOST_WORKERS
    assert StarOptions(block_size=MOST_TOKENS, anchor_size=0, query_size=MOST_TOKENS).query_size == MOST_TOKENS
    for kind, options in ((CQSOptions, {"workers": MOST_WORKERS + 1}), (StarOptions, {"query_size": MOST_TOKENS + 1})):
        with pytest.raises(ValueError, match="at most"):
            kind(**options)
    assert TiledOptions.of(None, "here") == TiledOptions()


@pytest.mark.parametrize("words", [["--interest-set", "5"], ["--workers", "1000000000"], ["--workers", "0"]])
def test_plan_cqs_refuses_in_one_line(capsys, words):
    from hf_attn_plugins.cli import main

    assert main(["plan", "cqs", "--length", "20", *words]) == 2
    captured = capsys.readouterr()
    assert len(captured.err.splitlines()) == 1 and words[0] in captured.err
