"""The tiny models of tests/families.py are fit to show faults: their softmax is sharp."""

from __future__ import annotations

import pytest
import torch

import hf_attn_plugins as hap
from tests.families import DECODERS, build, padded_batch


def sharpness(model, ids):
    """The largest attention weight, averaged over rows: tests on a uniform softmax would show nothing."""
    with hap.use(model, "eager"), torch.no_grad():
        weights = model(ids, output_attentions=True).attentions
    return max(float(w[..., 4:, :].amax(-1).mean()) for w in weights if w is not None)


@pytest.mark.parametrize("name", list(DECODERS))
def test_softmax_is_sharp(name):
    ids, _ = padded_batch()
    assert sharpness(build(name), ids[:1]) > 0.6
