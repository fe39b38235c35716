"""A quality gate: the build fails when an attention changes a model's predictions more than you allow.

Run it by pytest. Set MODEL and DTYPE to what you serve, and the limits to what you can accept. The noise of
bfloat16 is a KL of 0.002.
"""

from __future__ import annotations

import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_attn_plugins as hap

DTYPE = os.environ.get("DTYPE", "float32")
LENGTH = int(os.environ.get("LENGTH", "2048"))
GATES = [  # attention, its options, the largest KL, the least share of equal first choices
    ("tiled_attention", {}, 0.01, 0.95),
    ("star_attention", {"block_size": 128, "halo_size": 512}, 0.15, 0.80),
]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(os.environ.get("MODEL") or hap.demo_folder(), dtype=DTYPE)


@pytest.fixture(scope="module")
def ids(model) -> torch.Tensor:
    return tokens_for(model)


def tokens_for(model) -> torch.Tensor:
    """Text like the one that you serve is the better judge: put yours here."""
    from pydoc_data.topics import topics

    tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    return tokenizer("\n".join(topics.values())[: 16 * LENGTH], return_tensors="pt").input_ids[:, :LENGTH]


@pytest.mark.parametrize(("name", "options", "most_kl", "least_top1"), GATES)
def test_predictions_stay(model, ids, name, options, most_kl, least_top1):
    report = hap.compare(model, ids, name, baseline="sdpa", repeats=1, **options)
    said = f"{name}: KL {report.kl_mean:.4f}, same first choice {report.top1:.1%}; what ran: {report.plugin.plan}"
    assert report.kl_mean <= most_kl and report.top1 >= least_top1, said


def test_the_plugin_takes_effect(model):
    assert hap.check(model, "tiled_attention").ok, str(hap.check(model, "tiled_attention"))
