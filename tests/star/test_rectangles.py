"""Star in one launch: its plans as rectangles, and whole batches in one launch against the definition."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.star.entry import attention
from hf_attn_plugins.star.options import StarOptions
from hf_attn_plugins.star.plan import Plan
from hf_attn_plugins.star.rectangles import rectangles_of
from tests.kernels.triton_cases import ONE_LAUNCH_EACH, check, count_launches, draw, needs_interpreter
from tests.star.test_entry import pattern

SIZES = dict(block_size=9, anchor_size=5, query_size=6)
SPANS = [[(7, 36)], [(0, 23)]]  # padded on the left, padded on the right


def test_rectangles_by_hand():
    first, second, anchor, query = (0, 4, 0, 4), (4, 7, 4, 7), (4, 7, 0, 2), (7, 10, 0, 10)
    assert rectangles_of(Plan(10, 4, 2, 3)) == [Rectangle(*r, True) for r in (first, second, anchor, query)]
    assert rectangles_of(Plan(3, 4, 2, 3), 5) == [Rectangle(5, 8, 5, 8, True)]


@given(st.tuples(*[st.integers(0, most) for most in (40, 14, 15, 15, 3, 25)]))
@settings(deadline=None, max_examples=120)
def test_rectangles_hold_every_pair_of_the_plan_once(sizes):
    length, block, anchor, query, first, halo = sizes
    plan = Plan(length, block + 1, min(anchor, block + 1), query, halo)
    held = Counter(
        (t - first, s - first)
        for piece in rectangles_of(plan, first)
        for t in range(piece.row_begin, piece.row_end)
        for s in range(piece.key_begin, min(piece.key_end, t + 1))
    )
    assert held == Counter((t, s) for t in range(length) for s in range(t + 1) if plan.may_attend(t, s))


def seen_by(spans, rows, window=None):
    return torch.cat([pattern(prompts, rows, rows, StarOptions(**SIZES), window) for prompts in spans])


def padding(spans, rows):
    real = torch.zeros(len(spans), rows, dtype=torch.bool)
    for row, prompts in enumerate(spans):
        for first, end in prompts:
            real[row, first:end] = True
    return real


def holes():
    real = torch.ones(1, 36, dtype=torch.bool)
    real[0, [0, 4, 20, 35]] = False
    return real


BIAS = torch.rand(2, 1, 36, 36, generator=torch.Generator().manual_seed(0)) < 0.7
PACKED = torch.tensor([[0] * 12 + [1] * 24, [3] * 36])
CASES = {
    "plain": (Mask(), seen_by([[(0, 36)]], 36)),
    "padding on both sides": (Mask(key_padding=padding(SPANS, 36)), seen_by(SPANS, 36)),
    "padding and a window": (Mask(key_padding=padding(SPANS, 36), window=(10, None)), seen_by(SPANS, 36, 11)),
    "packed": (
        Mask(query_segments=PACKED, key_segments=PACKED),
        seen_by([[(0, 12), (12, 36)], [(0, 36)]], 36),
    ),
    "holes in the padding": (Mask(key_padding=holes()), seen_by([[(1, 35)]], 36) & holes()[:, None, None]),
    "a mask tensor": (Mask(bias=BIAS), seen_by([[(0, 36)]] * 2, 36) & BIAS),
}
HALO = dict(block_size=4, anchor_size=3, query_size=6, halo_size=7)


@needs_interpreter
@pytest.mark.parametrize("name", CASES)
def test_a_batch_is_one_launch(name, monkeypatch):
    mask, seen = CASES[name]
    softcap = dict(softcap=4.0) if name == "packed" else {}
    options = StarOptions(**SIZES, kernel="triton")
    names = count_launches(monkeypatch)

    def star(query, key, value):
        given = mask.replace(causal=True)
        return attention(
            query, key, value, given, scale=0.25, softcap=softcap.get("softcap"), dropout=0.0, options=options
        )

    gradients = name in ("plain", "padding and a window", "packed")
    check(draw(len(seen), 36, 36), dict(bias=seen), run=star, gradients=gradients, **softcap)
    assert names == (ONE_LAUNCH_EACH if gradients else ONE_LAUNCH_EACH[:1])


@needs_interpreter
@pytest.mark.parametrize("name", ["plain", "padding and a window", "packed"])
@pytest.mark.parametrize("heads", [(), (1,)])
def test_halo_and_dense_heads_are_one_launch(name, heads, monkeypatch):
    mask, spans, window = {
        "plain": (Mask(), [[(0, 36)]], None),
        "padding and a window": (Mask(key_padding=padding(SPANS, 36), window=(10, None)), SPANS, 11),
        "packed": (Mask(query_segments=PACKED, key_segments=PACKED), [[(0, 12), (12, 36)], [(0, 36)]], None),
    }[name]
    options = StarOptions(**HALO, dense_heads=[heads], kernel="triton")
    seen = torch.cat([pattern(prompts, 36, 36, options, window) for prompts in spans])
    names = count_launches(monkeypatch)

    def star(query, key, value):
        given = mask.replace(causal=True)
        return attention(query, key, value, given, scale=0.25, softcap=None, dropout=0.0, options=options)

    check(draw(len(seen), 36, 36, heads=(4, 2)), dict(bias=seen), run=star, gradients=name == "packed")
    assert names == (ONE_LAUNCH_EACH if name == "packed" else ONE_LAUNCH_EACH[:1])


@needs_interpreter
def test_a_static_cache_is_read_up_to_the_prompt_and_dense_batches_need_no_plan(monkeypatch):
    """Unwritten keys behind the prompt; prompts of one block are plain attention with a padding mask."""
    from hf_attn_plugins.kernels.triton import launch as triton_launch

    calls = []
    plain = triton_launch.forward
    monkeypatch.setattr(triton_launch, "forward", lambda *given: calls.append(given[3]) or plain(*given))
    query, key, value = draw(2, 20, 20)
    key, value = (torch.cat([x, torch.full_like(x, torch.nan)], 2) for x in (key, value))
    real = padding([[(0, 20)], [(4, 20)]], 40)
    mask = Mask(causal=True, offset=0, key_padding=real)
    for block, plans in ((9, True), (30, False)):
        sizes = dict(block_size=block, anchor_size=5, query_size=6)

        def star(*inputs, sizes=sizes):
            options = StarOptions(**sizes, kernel="triton")
            return attention(*inputs, mask, scale=0.25, softcap=None, dropout=0.0, options=options)

        seen = torch.cat([pattern([span], 20, 20, StarOptions(**sizes)) for span in ((0, 20), (4, 20))])
        out, lse = star(query, key, value)
        check(
            (query, key[:, :, :20], value[:, :, :20]), dict(bias=seen | seen.new_zeros(1)), gradients=False,
            run=lambda *_, part=(out, lse): part,
        )  # fmt: skip
        assert bool(calls.pop().pieces) == plans and not calls


@needs_interpreter
def test_compiles_as_one_graph():
    inputs = draw(1, 20, 20)
    options = StarOptions(**SIZES, kernel="triton")

    def star(query, key, value):
        mask = Mask(causal=True)
        return attention(query, key, value, mask, scale=0.25, softcap=None, dropout=0.0, options=options).out

    assert torch.equal(torch.compile(star, fullgraph=True, backend="aot_eager")(*inputs), star(*inputs))
