"""The CPU tiles' guess of a row's largest score, wherever that score lies."""

import pytest
import torch

from hf_attn_plugins.kernels import attend
from hf_attn_plugins.kernels.cpu import forward as cpu
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention

ROWS, DIM = 704, 16


def inputs(place):
    """(query, key, value) in float64 whose weights lie at the head, next to the row, in the middle, or ever later."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, ROWS, DIM, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
    if place == "near":
        key = 10 * torch.nn.functional.normalize(key, dim=-1)
        query = key.repeat_interleave(2, 1)
        return query, key, value
    query[..., 0] = 10
    key[..., 0] = 0
    if place == "head":
        key[:, :, :10, 0] = 8
    elif place == "middle":
        key[:, :, 400:405, 0] = 8
    else:
        key[..., 0] = torch.arange(ROWS) / 50
    return query, key, value


@pytest.mark.parametrize("place, again", [("head", False), ("near", False), ("middle", True), ("rising", False)])
def test_the_largest_scores_may_lie_anywhere(monkeypatch, place, again):
    count = {"shifts": 0, "rows": 0}

    def counted(name, method):
        def call(self, *arguments):
            count[name] += 1
            return method(self, *arguments)

        return call

    monkeypatch.setattr(cpu._FastRows, "new_shift", counted("shifts", cpu._FastRows.new_shift))
    monkeypatch.setattr(cpu._FastRows, "run", counted("rows", cpu._FastRows.run))
    exact = inputs(place)
    low = [x.bfloat16() for x in exact]
    reference = [x.double() for x in low]
    visible = torch.ones(ROWS, ROWS, dtype=torch.bool).tril()
    out, lse = dense_attention(*reference, visible)
    low_out, low_lse = dense_attention(*low, visible)
    part = attend(*low, is_causal=True, kernel="cpu_tiled")
    assert_close_to_reference(part.out, low_out, out)
    assert_close_to_reference(part.lse, low_lse, lse, name="lse")
    assert (count["shifts"] > count["rows"]) == again  # a tile is done twice only where the guess was far off
