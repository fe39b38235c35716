"""FlexAttention with our masks: the tiles against a mask written out, and results on the CPU, uncompiled."""

from __future__ import annotations

import pytest
import torch

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.kernels.flex import attend as flex
from hf_attn_plugins.kernels.flex.blocks import TILE, tiles_of
from hf_attn_plugins.kernels.segment_labels import make_labels
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention, sharp_inputs

index = torch.arange


def segments(rows, keys):
    own = index(keys) // 150
    return dict(query_segments=own[keys - rows :].expand(2, rows), key_segments=own.expand(2, keys))


MASKS = {
    "full": lambda t, s: {},
    "causal": lambda t, s: dict(causal=True),
    "an offset": lambda t, s: dict(causal=True, offset=-40),
    "an offset in a tensor": lambda t, s: dict(causal=True, offset=torch.tensor(s - t)),
    "window": lambda t, s: dict(causal=True, window=(90, None)),
    "two-sided window": lambda t, s: dict(window=(200, 170)),
    "prefix": lambda t, s: dict(causal=True, prefix=min(s, 140)),
    "prefix and window": lambda t, s: dict(causal=True, prefix=min(s, 140), window=(30, None)),
    "padding": lambda t, s: dict(causal=True, key_padding=torch.stack([index(s) >= s // 2, index(s) < s // 2])),
    "a row without keys": lambda t, s: dict(key_padding=torch.stack([index(s) >= 0, index(s) < 0])),
    "segments": lambda t, s: dict(causal=True, **segments(t, s)),
    "segments and padding": lambda t, s: dict(**segments(t, s), key_padding=(index(s) > 20).expand(2, s)),
    "predicate": lambda t, s: dict(causal=True, predicate=lambda b, h, q, k: (q + k) % 3 != b),
    "bool mask": lambda t, s: dict(bias=(index(t)[:, None] + index(s)) % 4 > 0),
}


@pytest.mark.parametrize("shape", [(1, 300), (130, 300), (300, 300), (256, 256), (300, 130)])
@pytest.mark.parametrize("name", MASKS)
def test_tiles_hold_every_pair_and_full_ones_only_seen_pairs(name, shape):
    rows, keys = shape
    if name.startswith("segments") and rows > keys:
        pytest.skip("packed rows have keys of their own")
    mask = Mask(**MASKS[name](rows, keys))
    labels = make_labels(mask.key_padding, mask.query_segments, mask.key_segments)
    tiles = tiles_of(mask, labels, rows, keys, torch.device("cpu"))
    visible = mask.visible(index(rows), index(keys), mask.start(rows, keys), 2).expand(2, 1, rows, keys)[:, 0]
    many = sum(len(x) for x in (index(0, rows, TILE), index(0, keys, TILE)))
    for b in range(2):
        for i in range(-(-rows // TILE)):
            masked, full = (
                set(indices[b % len(indices), 0, i, : counts[b % len(counts), 0, i]].tolist())
                for counts, indices in (tiles[:2], tiles[2:])
            )
            assert not masked & full and len(masked | full) <= many
            for j in range(-(-keys // TILE)):
                tile = visible[b, i * TILE : (i + 1) * TILE, j * TILE : (j + 1) * TILE]
                assert not tile.any() or j in masked | full
                assert j not in full or (bool(tile.all()) and tile.shape == (TILE, TILE))


def test_causal_tiles_are_half_of_all():
    counts, _, full, _ = tiles_of(Mask(causal=True), None, 1024, 1024, torch.device("cpu"))
    assert counts.flatten().tolist() == [1] * 8 and full.flatten().tolist() == list(range(8))


@pytest.mark.parametrize("name", MASKS)
def test_results(name):
    inputs = sharp_inputs(2, 4, 2, 9, 40, 20, 12)
    fields = MASKS[name](9, 40)
    mask = Mask(**fields)
    visible = mask.visible(index(9), index(40), mask.start(9, 40), 2)
    with torch.no_grad():
        part = attend(*inputs, mask=mask, kernel="flex")
    ref, low = dense_attention(*(x.double() for x in inputs), visible), dense_attention(*inputs, visible)
    seen = ref[1] > -torch.inf
    assert torch.equal(part.lse > -torch.inf, seen)
    assert_close_to_reference(part.out, low[0], ref[0])
    assert_close_to_reference(part.lse[seen], low[1][seen], ref[1][seen], name="lse")


def test_softcap_and_a_float_bias():
    inputs, bias = sharp_inputs(2, 4, 2, 9, 40, 16), torch.randn(4, 9, 40)
    part = attend(*inputs, mask=bias, softcap=5.0, kernel="flex")
    everything = torch.ones((), dtype=torch.bool)
    ref = dense_attention(*(x.double() for x in inputs), everything, softcap=5.0, bias=bias.double())
    low = dense_attention(*inputs, everything, softcap=5.0, bias=bias)
    assert_close_to_reference(part.out, low[0], ref[0], 3.0)
    assert_close_to_reference(part.lse, low[1], ref[1], 3.0)


def test_what_it_cannot_do_is_said():
    query, key, value = sharp_inputs(1, 2, 2, 4, 8, 16)
    for options, words in (
        (dict(dropout=0.1), "dropout"),
        (dict(mask=torch.zeros(4, 8, requires_grad=True)), "needs a gradient"),
    ):
        with pytest.raises(NotImplementedError, match=words):
            attend(query, key, value, kernel="flex", **options)
    with pytest.raises(NotImplementedError, match="gradients on a CPU"):
        attend(query.requires_grad_(), key, value, kernel="flex")


def test_a_compiler_that_fails_is_reported(monkeypatch):
    def broken(compile):
        def run(*inputs):
            raise RuntimeError("no compiler\nat all")

        return run

    monkeypatch.setattr(flex, "flex_attention", broken)
    with pytest.raises(flex.Failed, match="RuntimeError: no compiler at all"):
        attend(*sharp_inputs(1, 2, 2, 4, 8, 16), kernel="flex")


@pytest.mark.gpu
@pytest.mark.parametrize("name", MASKS)
def test_compiled_on_a_gpu(name):
    inputs = [x.cuda().bfloat16().requires_grad_() for x in sharp_inputs(2, 4, 2, 130, 300, 64)]
    fields = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in MASKS[name](130, 300).items()}
    mask, t, s = Mask(**fields), index(130).cuda(), index(300).cuda()
    visible = mask.visible(t, s, mask.start(130, 300), 2)
    part = attend(*inputs, mask=mask, kernel="flex")
    ref, low = dense_attention(*(x.double() for x in inputs), visible), dense_attention(*inputs, visible)
    assert_close_to_reference(part.out, low[0], ref[0])
    grads = [torch.autograd.grad((out.double() * ref[0].detach()).sum(), inputs) for out in (part.out, low[0], ref[0])]
    for ours, plain, exact in zip(*grads, strict=True):
        assert_close_to_reference(ours, plain, exact.double(), 3.0)
