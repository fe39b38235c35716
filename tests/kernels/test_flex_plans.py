"""FlexAttention with plans: tables and tiles against pairs written out; star, cqs and packed calls in one launch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_plugins import cqs
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.kernels.attend_rectangles import attend_rectangles
from hf_attn_plugins.kernels.flex import attend as flex
from hf_attn_plugins.kernels.flex import pairs, plan
from hf_attn_plugins.kernels.flex.bands import WHOLE, Bands, Run, bands_of
from hf_attn_plugins.kernels.flex.blocks import tiles_of
from hf_attn_plugins.kernels.segment_labels import make_labels
from hf_attn_plugins.kernels.varlen import attend_varlen
from hf_attn_plugins.star.entry import attention as star_attention
from hf_attn_plugins.star.options import StarOptions
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention, sharp_inputs
from tests.kernels.triton_cases import check, draw
from tests.star.test_entry import pattern

CPU, T = torch.device("cpu"), plan.TILE


def test_bands_by_hand():
    found = bands_of([Rectangle(0, 2, 0, 4), Rectangle(1, 3, 4, 5), Rectangle(3, 3, 0, 5)], 5)
    alike, apart = Run(0, 5, WHOLE), (Run(0, 4, WHOLE), Run(4, 5, WHOLE))
    assert found == Bands((0, 1, 2, 3, 5), ((apart[0],), (alike,), (apart[1],), ()))
    assert found.key_cuts == [0, 4, 5]
    # Triangles are joined only where they have one shift.
    for shift, runs in ((7, (Run(0, 6, 7),)), (8, (Run(0, 3, 7), Run(3, 6, 8)))):
        assert bands_of([Rectangle(0, 4, 0, 3, True, 7), Rectangle(0, 4, 3, 6, True, shift)], 4).runs == (runs,)


def test_pairs_that_two_rectangles_share_are_refused():
    """Merged one by one they would count twice; a list of tiles holds them once."""
    twice = [Rectangle(0, 6, 0, 5), Rectangle(4, 8, 3, 8, True)]
    inputs = sharp_inputs(1, 2, 2, 8, 8, 16)
    with pytest.raises(NotImplementedError, match=r"share pairs \(keys 3 .. 5 of the same rows\): use kernel=None"):
        attend_rectangles(*inputs, twice, kernel="flex")
    assert plan.reason_against_plan([[twice[0]], [twice[1]]], 8) is None  # in two rows of the batch nothing is shared


def test_a_plan_of_too_many_small_pieces_is_refused(monkeypatch):
    monkeypatch.setattr("hf_attn_plugins.kernels.flex.bands.MOST_ENTRIES", 30)
    with pytest.raises(NotImplementedError, match="cut into 8 parts and keys at 9 places"):
        bands_of([Rectangle(i, i + 1, i, i + 1) for i in range(8)], 8)


edges = st.integers(0, 3 * T).map(lambda n: n if n % 3 else n // T * T)  # often at the edge of a tile


@st.composite
def plans(draw):
    """Disjoint rectangles: cells of a grid, each nothing, seen whole, or bound by positions with a shift."""
    cuts = [sorted({0, *draw(st.lists(edges, min_size=1, max_size=4))}) for _ in range(2)]
    found = []
    for r in zip(cuts[0], cuts[0][1:], strict=False):
        for k in zip(cuts[1], cuts[1][1:], strict=False):
            kind = draw(st.sampled_from(["none", "whole", "bound", "bound"]))
            if kind != "none":
                found.append(Rectangle(*r, *k, kind == "bound", draw(st.sampled_from([0, 0, -70, 200]))))
    return found


def written_out(plan, mask, rows, keys, start):
    """The plan's pairs: (rows, keys), bool."""
    seen = torch.zeros(rows, keys, dtype=torch.bool)
    for piece in plan:
        t, s = (torch.arange(*piece[i : i + 2]) for i in (0, 2))
        of_piece = torch.ones(len(t), len(s), dtype=torch.bool)
        if piece.position_masked:
            of_piece = mask.visible(t, s, start + piece.shift)[0, 0]
        seen[piece.row_begin : piece.row_end, piece.key_begin : piece.key_end] = of_piece
    return seen


@given(
    st.lists(plans(), min_size=1, max_size=3),
    st.sampled_from([{}, dict(causal=True), dict(causal=True, window=(90, None)), dict(window=(T, 40))]),
    st.sampled_from([None, 0, -60, 130]),
    st.sampled_from([0, 0, T, 150]),
)
@settings(deadline=None, max_examples=80)
def test_tiles_and_pairs_of_a_plan(lists, bounds, offset, prefix):
    rows, keys = (max(2, *(each[i] for rectangles in lists for each in rectangles), 2) for i in (1, 3))
    mask = Mask(**bounds, offset=offset, prefix=min(prefix, keys))
    start = mask.start(rows, keys)
    by_row = [*lists, lists[0]]  # two rows of the batch follow one list
    places, which = plan.places_of(by_row, mask, rows, keys)
    whole = plan.plan_of(places, which, CPU)
    counts, tiles, full_counts, full_tiles = tiles_of(mask, None, rows, keys, CPU, whole.tiles())
    bound = mask.replace(causal=False, window=(places.left, places.right), offset=places.start)
    function = pairs.pairs_seen(bound, None, rows, keys, CPU, whole)
    t, s = torch.arange(rows)[:, None], torch.arange(keys)[None]
    for b, rectangles in enumerate(by_row):
        expected = written_out(rectangles, mask, rows, keys, start)
        assert torch.equal(function(torch.tensor(b), torch.tensor(0), t, s).expand(rows, keys), expected)
        own = b % len(counts)
        for i in range(-(-rows // T)):
            partial = set(tiles[own, 0, i, : counts[own, 0, i]].tolist())
            full = set(full_tiles[own, 0, i, : full_counts[own, 0, i]].tolist())
            assert not partial & full
            for j in range(-(-keys // T)):
                tile = expected[i * T : (i + 1) * T, j * T : (j + 1) * T]
                every = bool(tile.all()) and tile.shape == (T, T)
                assert (j in partial | full) == bool(tile.any())
                assert (j in full) == every or (prefix and every and j in partial)


BLOCKS = [Rectangle(0, 200, 0, 200, True), Rectangle(200, 300, 0, 50), Rectangle(200, 300, 200, 300, True)]


@pytest.mark.parametrize("more", ["padding", "segments", "bool mask", "predicate"])
def test_tiles_of_a_plan_under_tensors_hold_every_pair_and_full_ones_only_seen_pairs(more):
    index = torch.arange(300)
    mask = Mask(causal=True, offset=0, **{
        "padding": dict(key_padding=torch.stack([index >= 140, index < 130])),
        "segments": dict(query_segments=(index // 150).expand(2, 300), key_segments=(index // 150).expand(2, 300)),
        "bool mask": dict(bias=(index[:, None] + index) % 4 > 0),
        "predicate": dict(predicate=lambda b, h, q, k: (q + k) % 3 != b),
    }[more])  # fmt: skip
    labels = make_labels(mask.key_padding, mask.query_segments, mask.key_segments)
    whole = plan.plan_of(*plan.places_of([BLOCKS], mask, 300, 300), CPU)
    tiles = tiles_of(mask, labels, 300, 300, CPU, whole.tiles())
    function = pairs.pairs_seen(mask, labels, 300, 300, CPU, whole)
    visible = mask.visible(index, index, 0, 2).expand(2, 1, 300, 300)[:, 0]
    for b in range(2):
        expected = visible[b] & written_out(BLOCKS, Mask(causal=True), 300, 300, 0)
        seen = function(torch.tensor(b), torch.tensor(0), index[:, None], index[None])
        assert torch.equal(seen.expand(300, 300), expected)
        for i in range(3):
            masked, full = (
                set(indices[b % len(indices), 0, i, : counts[b % len(counts), 0, i]].tolist())
                for counts, indices in (tiles[:2], tiles[2:])
            )
            for j in range(3):
                tile = expected[i * T : (i + 1) * T, j * T : (j + 1) * T]
                assert (not tile.any() or j in masked | full) and (j not in full or bool(tile.all()))


@pytest.fixture
def calls(monkeypatch):
    """Counts the calls of FlexAttention and lets the CPU, on which PyTorch refuses gradients, have them uncompiled."""
    found = []
    plain = flex.flex_attention

    def counting(compile):
        run = plain(compile)
        return lambda *given: found.append(given) or run(*given)

    monkeypatch.setattr(flex, "flex_attention", counting)
    monkeypatch.setattr(flex, "needs_gradient", lambda *tensors: False)
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    return found


SIZES = dict(block_size=9, anchor_size=5, query_size=6, halo_size=3)
SPANS = [[(7, 36)], [(0, 23)]]  # padded on the left, padded on the right
PACKED = torch.tensor([[0] * 12 + [1] * 24, [3] * 36])
REAL = torch.stack([(torch.arange(36) >= 7), torch.arange(36) < 23])


STARS = ("plain", "padding and a window", "packed", "softcap", "float bias")
QUICK = (("plain", (1,)), ("padding and a window", ()), ("packed", (1,)), ("softcap", ()))  # the others: -m grid


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        pytest.param(name, heads, marks=[] if (name, heads) in QUICK else pytest.mark.grid)
        for name in STARS
        for heads in ((), (1,))
    ],
)
def test_star_is_one_call(name, heads, calls):
    bias = torch.randn(1, 1, 36, 36, generator=torch.Generator().manual_seed(0))
    mask, spans, window, softcap = {
        "plain": (Mask(), [[(0, 36)]], None, None),
        "padding and a window": (Mask(key_padding=REAL, window=(10, None)), SPANS, 11, None),
        "packed": (Mask(query_segments=PACKED, key_segments=PACKED), [[(0, 12), (12, 36)], [(0, 36)]], None, None),
        "softcap": (Mask(), [[(0, 36)]], None, 4.0),
        "float bias": (Mask(bias=bias), [[(0, 36)]], None, None),
    }[name]
    options = StarOptions(**SIZES, dense_heads=[heads], kernel="flex")
    seen = torch.cat([pattern(prompts, 36, 36, options, window) for prompts in spans])
    fields = dict(bias=seen if name != "float bias" else bias.masked_fill(~seen, -torch.inf))

    def star(query, key, value):
        given = mask.replace(causal=True)
        return star_attention(query, key, value, given, scale=0.25, softcap=softcap, dropout=0.0, options=options)

    more = {} if softcap is None else dict(softcap=softcap)
    check(draw(len(seen), 36, 36, heads=(4, 2)), fields, run=star, **more)
    assert len(calls) == (2 if name == "float bias" and heads else 1)  # a mask tensor goes head by head


@pytest.mark.parametrize("workers", [7, pytest.param((3, 2), marks=pytest.mark.grid)], ids=str)
@pytest.mark.parametrize("name", ["causal", "all pairs", "prefix and softcap", "window"])
def test_cqs_is_one_call(name, workers, calls):
    fields = {
        "causal": dict(is_causal=True),
        "all pairs": {},
        "prefix and softcap": dict(is_causal=True, prefix=11),
        "window": dict(is_causal=True, window=(9, None)),
    }[name]
    softcap = dict(softcap=4.0) if "softcap" in name else {}
    mask = Mask(**{("causal" if field == "is_causal" else field): value for field, value in fields.items()})

    def run(query, key, value):
        return cqs.attention(query, key, value, cqs.plan(36, workers), mask=mask, kernel="flex", **softcap)

    check(draw(1, 36, 36), fields, run=run, **softcap)
    assert len(calls) == 1


def test_one_worker_of_cqs_is_one_call(calls):
    """The pieces of one worker, which skip most pairs; other rows give out 0 and lse -inf."""
    pieces = cqs.planning.rectangles.rectangles_of([next(iter(cqs.plan(28, 7).leaves()))], True)
    seen = written_out(pieces, Mask(causal=True), 28, 28, 0)
    assert 0 < seen.sum() < 200 and not seen.any(-1).all()
    run = lambda q, k, v: attend_rectangles(q, k, v, pieces, mask=Mask(causal=True), kernel="flex")  # noqa: E731
    check(draw(2, 28, 28), dict(bias=seen[None, None]), run=run)
    assert len(calls) == 1


def test_packed_sequences_of_two_lengths_are_one_call(calls):
    rows, keys = [0, 5, 12], [0, 9, 20]
    seen = torch.zeros(1, 1, 14, 22, dtype=torch.bool)
    for t0, t1, s0, s1 in ((0, 5, 0, 9), (5, 12, 9, 20)):
        for t in range(t0, t1):
            position = s1 - (t1 - t)
            seen[0, 0, t, max(s0, position - 3) : position + 1] = True

    def run(query, key, value):
        return attend_varlen(query, key, value, rows, keys, is_causal=True, window=4, kernel="flex")

    check(draw(1, 14, 22), dict(bias=seen), run=run)
    assert len(calls) == 1


def test_block_masks_of_a_plan_are_made_once(calls):
    inputs = sharp_inputs(1, 2, 2, 50, 50, 16)
    pieces = [Rectangle(0, 50, 0, 50, True)]
    with torch.inference_mode():
        first = attend_rectangles(*inputs, pieces, mask=Mask(causal=True), kernel="flex")
    inputs = [x.requires_grad_() for x in inputs]  # what was kept must serve gradients as well
    again = attend_rectangles(*inputs, list(pieces), mask=Mask(causal=True), kernel="flex")
    attend_rectangles(*inputs, pieces, mask=Mask(causal=True, window=(9, None)), kernel="flex")
    again.out.sum().backward()
    masks = [given[4] for given in calls]
    assert masks[0] is masks[1] and masks[1] is not masks[2]
    torch.testing.assert_close(first.out, again.out.detach())
    with torch.inference_mode():
        tables = plan.plan_of(*plan.places_of([pieces, []], Mask(offset=-3), 50, 50), CPU)
        kept = [*tables, pairs._numbers((1, 2), CPU), pairs._cap(3.0, CPU), masks[0].kv_indices, masks[0].q_indices]
    assert not any(tensor.is_inference() for tensor in kept)


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("heads", [(), (1,)], ids=["sparse", "a dense head"])
def test_star_compiled_on_a_gpu(heads, softcap):
    options = StarOptions(block_size=100, anchor_size=40, query_size=50, dense_heads=[heads], kernel="flex")
    seen = pattern([(0, 500)], 500, 500, options).cuda()

    def star(query, key, value):
        mask = Mask(causal=True)
        return star_attention(query, key, value, mask, scale=0.125, softcap=softcap, dropout=0.0, options=options)

    inputs = [x.cuda().bfloat16() for x in draw(1, 500, 500, heads=(4, 2), dims=(64, 64))]
    results = []
    for kind in (torch.float64, torch.bfloat16, None):
        leaves = [x.to(kind or torch.bfloat16).requires_grad_() for x in inputs]
        out, lse = star(*leaves) if kind is None else dense_attention(*leaves, seen, softcap=softcap)
        grads = torch.autograd.grad(out.double().pow(2).sum() + lse.double().sum(), leaves)
        results.append([out.detach(), lse.detach(), *grads])
    for ref, low, ours in zip(*results, strict=True):
        assert_close_to_reference(ours, low, ref, 3.0)
