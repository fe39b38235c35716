"""Dropout in every kernel: which weights are dropped follows from the seed and the places alone, by one definition."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from hf_attn_plugins.core.drops import Drops, share_below
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.kernels.attend_rectangles import attend_rectangles
from hf_attn_plugins.kernels.cpu_fused import build
from hf_attn_plugins.kernels.triton.support import INSTALLED, interpreting

BATCH, HEADS, ROWS, KEYS, P = 3, 4, 37, 48, 0.3
RUNS = {"cpu_fused": not build.unavailable(torch.float32), "triton": INSTALLED and interpreting()}
KERNELS = [
    pytest.param(name, marks=pytest.mark.skipif(not RUNS.get(name, True), reason="does not run here"))
    for name in ("reference", "cpu_tiled", "cpu_fused", "triton")
]


def mixed(x: int) -> int:
    """32 bits mixed, in Python's integers."""
    x = (x ^ x >> 16) * 0x7FEB352D % 2**32
    x = (x ^ x >> 15) * 0x846CA68B % 2**32
    return x ^ x >> 16


def is_kept(seed: int, lane: int, row: int, key: int) -> bool:
    own = mixed(mixed(row % 2**32 ^ seed % 2**32) ^ mixed((lane + mixed(seed >> 32)) % 2**32))
    other = mixed((key + mixed((seed >> 16) % 2**32)) % 2**32)
    return mixed(own ^ other) >> 8 >= round(P * 2**24)


def anywhere(seed: int) -> Drops:
    """Places in no order, other ones in every batch row."""
    generator = torch.Generator().manual_seed(seed)

    def places(*size: int) -> Tensor:
        return torch.randint(2**20, size, generator=generator)

    return Drops(torch.tensor(2**61 + 12345 * seed), places(BATCH, HEADS), places(BATCH, ROWS), places(BATCH, KEYS))


def weights_kept(drops: Drops, kernel: str, plan: list[Rectangle] | None = None) -> Tensor:
    """(B, H, T, S) bool, read from equal scores and one-hot values."""
    nothing = torch.zeros(BATCH, HEADS, KEYS, 16)
    inputs = nothing[:, :, :ROWS], nothing, torch.eye(KEYS).expand(BATCH, HEADS, KEYS, KEYS)
    mask = Mask(drops=drops)
    if plan:
        return attend_rectangles(*inputs, plan, mask=mask, dropout=P, kernel=kernel).out > 0
    return attend(*inputs, mask=mask, dropout=P, kernel=kernel).out > 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_definition(kernel: str) -> None:
    drops = anywhere(3)
    found = weights_kept(drops, kernel)
    choose = random.Random(0)
    for _ in range(2000):
        b, h, t, s = (choose.randrange(size) for size in (BATCH, HEADS, ROWS, KEYS))
        place = int(drops.lanes[b, h]), int(drops.rows[b, t]), int(drops.keys[b, s])
        assert bool(found[b, h, t, s]) == is_kept(int(drops.seed), *place), (b, h, t, s)
    assert torch.equal(found, drops.kept(P, torch.float64) > 0)
    plan = [Rectangle(0, 20, 0, KEYS), Rectangle(20, ROWS, 0, 17), Rectangle(20, ROWS, 17, KEYS)]
    assert torch.equal(weights_kept(drops, kernel, plan), found)


def test_parts_of_a_call_keep_their_places() -> None:
    drops = anywhere(5)
    whole = drops.kept(P, torch.float64)
    assert torch.equal(
        drops.cut(slice(3, 9), slice(7, 11), slice(1, 3)).kept(P, torch.float64), whole[:, 1:3, 3:9, 7:11]
    )
    joined = torch.cat([whole[:, :, 3:9, 7:11], whole[:, :, 3:9, 20:21]], 3)
    assert torch.equal(drops.at(slice(3, 9), [(7, 11), (20, 21)]).kept(P, torch.float64), joined)
    assert torch.equal(drops.of_batch_row(2).kept(P, torch.float64), whole[2:])
    assert torch.equal(drops.folded(2).kept(P, torch.float64), whole.reshape(BATCH * 2, HEADS // 2, ROWS, KEYS))


def test_a_new_call_draws_a_new_seed_and_neighbours_are_independent() -> None:
    torch.manual_seed(1)
    one, other = (Drops.draw(torch.empty(4, 8), 64, 64).kept(P, torch.float64) > 0 for _ in range(2))
    for pair in ((one, other), (one[1:], one[:-1]), (one[:, 1:], one[:, :-1]), (one[:, :, 1:], one[:, :, :-1])):
        both = (pair[0] & pair[1]).double()
        assert abs(both.mean() - (1 - P) ** 2) < 5 * 0.5 / both.numel() ** 0.5


@pytest.mark.parametrize("share", [1e-9, 0.1, 0.5, 0.999, 1 - 1e-12])
def test_the_share_of_dropped_weights(share: float) -> None:
    assert abs(share_below(share) / 2**24 - share) <= 2**-24
