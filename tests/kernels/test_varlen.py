"""Packed sequences of different query and key lengths, causal to the bottom right of each, against the definition."""

from __future__ import annotations

import pytest
import torch

from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.kernels.varlen import attend_varlen, rectangles_of
from hf_attn_plugins.testing import dense_attention, sharp_inputs
from tests.kernels.triton_cases import ONE_LAUNCH_EACH, check, count_launches, draw, needs_interpreter

ROWS, KEYS = [0, 5, 5, 24, 31], [0, 17, 20, 25, 33]  # more keys, no rows, more rows, and rows and keys left over
CASES = {
    "full": dict(),
    "causal": dict(is_causal=True),
    "window": dict(is_causal=True, window=6),
}


def seen_by(is_causal=False, window=None):
    """(1, 1, 33, 36), pair by pair."""
    seen = torch.zeros(1, 1, 33, 36, dtype=torch.bool)
    for t in range(33):
        for s in range(36):
            for i in range(4):
                if ROWS[i] <= t < ROWS[i + 1] and KEYS[i] <= s < KEYS[i + 1]:
                    before = (t - ROWS[i + 1]) - (s - KEYS[i + 1])  # how far the key lies before the row
                    seen[0, 0, t, s] = (not is_causal or before >= 0) and (window is None or before < window)
    return seen


def test_rectangles_by_hand():
    assert rectangles_of([0, 2, 5], [0, 4, 5]) == [Rectangle(0, 2, 0, 4, True, 2), Rectangle(2, 5, 4, 5, True, 0)]


@pytest.mark.parametrize("name", CASES)
def test_one_by_one(name):
    inputs = sharp_inputs(1, 4, 2, 33, 36, 16, 8, dtype=torch.float64)
    ours = attend_varlen(*inputs, torch.tensor(ROWS), torch.tensor(KEYS), **CASES[name])
    for one, other in zip(ours, dense_attention(*inputs, seen_by(**CASES[name])), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


@needs_interpreter
@pytest.mark.parametrize("name", CASES)
def test_in_one_launch(name, monkeypatch):
    names = count_launches(monkeypatch)
    softcap = dict(softcap=4.0) if name == "causal" else {}
    gradients = name != "full"

    def run(query, key, value):
        return attend_varlen(query, key, value, ROWS, KEYS, kernel="triton", **CASES[name], **softcap)

    check(draw(1, 33, 36), dict(bias=seen_by(**CASES[name])), run=run, gradients=gradients, **softcap)
    assert names == (ONE_LAUNCH_EACH if gradients else ONE_LAUNCH_EACH[:1])


@pytest.mark.parametrize(
    ("rows", "keys", "words"),
    [([1, 5], [0, 5], "begin at 0"), ([0, 5, 3], [0, 5, 6], "decrease"), ([0, 5], [0, 5, 6], "2 sequences"),
     ([0, 9], [0, 5], "end at row 9")],
)  # fmt: skip
def test_offsets_that_do_not_fit_are_named(rows, keys, words):
    inputs = sharp_inputs(1, 2, 1, 8, 8, 4)
    with pytest.raises(ValueError, match=words):
        attend_varlen(*inputs, rows, keys)
    with pytest.raises(ValueError, match="one row of a batch"):
        attend_varlen(*(x.expand(2, -1, -1, -1) for x in inputs), [0, 8])
