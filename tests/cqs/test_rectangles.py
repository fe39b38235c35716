"""CQS on the Triton kernels: the workers' cells as rectangles, and all in one launch against dense attention."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_plugins import cqs
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.cqs import entry as plugin
from hf_attn_plugins.cqs.options import CQSOptions
from hf_attn_plugins.cqs.planning.rectangles import of_plan, rectangles_of
from tests.kernels.triton_cases import ONE_LAUNCH_EACH, check, count_launches, draw, needs_interpreter, padding


def test_rectangles_by_hand():
    assert of_plan(cqs.plan(8, 2), True) == [Rectangle(0, 4, 0, 4, True), Rectangle(4, 8, 0, 8, True)]
    worker = [next(iter(cqs.plan(14, 7).leaves()))]  # groups 0, 1 and 3; its own and the pairs between them
    assert rectangles_of(worker, True) == [
        Rectangle(0, 2, 0, 2, True),
        Rectangle(2, 4, 0, 2, True),
        Rectangle(6, 8, 0, 4, True),
    ]


@given(
    st.integers(0, 40),
    st.one_of(st.integers(1, 9), st.tuples(st.integers(1, 4), st.integers(1, 4))),
    st.booleans(),
    st.data(),
)
@settings(deadline=None, max_examples=60)
def test_rectangles_hold_every_kept_cell_once(tokens, workers, is_causal, data):
    leaves = list(cqs.plan(tokens, workers).leaves())
    some = [leaf for leaf in leaves if data.draw(st.booleans())]
    for chosen in (some, leaves):
        held = Counter(
            (t, s)
            for piece in rectangles_of(chosen, is_causal)
            for t in range(piece.row_begin, piece.row_end)
            for s in range(piece.key_begin, min(piece.key_end, t + 1) if is_causal else piece.key_end)
        )
        assert not held or max(held.values()) == 1
        assert held.total() == sum(leaf.cells(is_causal) for leaf in chosen)
    assert held.total() == (tokens * (tokens + 1) // 2 if is_causal else tokens**2)


MASKS = {
    "padding and a window": dict(is_causal=True, window=(9, None), key_padding=padding(3, 36)),
    "all pairs": dict(),
    "prefix and softcap": dict(is_causal=True, prefix=11),
}


@needs_interpreter
@pytest.mark.parametrize(
    ("name", "workers"), [(name, 7) for name in MASKS] + [("padding and a window", (3, 2))], ids=str
)
def test_all_workers_are_one_launch(name, workers, monkeypatch):
    fields, names = MASKS[name], count_launches(monkeypatch)
    softcap = dict(softcap=4.0) if "softcap" in name else {}
    mask = Mask(**{("causal" if field == "is_causal" else field): value for field, value in fields.items()})
    batch = len(fields.get("key_padding", [0]))

    def run(query, key, value):
        return cqs.attention(query, key, value, cqs.plan(36, workers), mask=mask, kernel="triton", **softcap)

    gradients = workers == 7 and name != "all pairs"
    check(draw(batch, 36, 36), fields, run=run, gradients=gradients, **softcap)
    assert names == (ONE_LAUNCH_EACH if gradients else ONE_LAUNCH_EACH[:1])


@needs_interpreter
def test_the_plugin_is_one_launch_and_a_budget_goes_worker_by_worker(monkeypatch):
    names = count_launches(monkeypatch)
    inputs = draw(1, 36, 36)

    def prefill(query, key, value):
        options = CQSOptions(workers=7, min_length=8, kernel="triton")
        return plugin.attention(
            query, key, value, Mask(causal=True), scale=0.25, softcap=None, dropout=0.0, options=options
        )

    check(inputs, dict(is_causal=True), run=prefill, gradients=False)
    assert names == ["forward_kernel"]
    with torch.no_grad():
        plan = cqs.plan(36, 7)
        part = cqs.attention(*inputs, plan, is_causal=True, kernel="triton", memory_budget="80MiB")
    # One launch (two for its few rows, as a decoding step has them) for every range of rows that a worker has keys for.
    pieces_of_workers = sum(1 for leaf in plan.leaves() for _ in leaf.pieces(True))
    assert len(names) - 1 == 2 * pieces_of_workers
    torch.testing.assert_close(part.out, prefill(*inputs).out, atol=1e-4, rtol=1e-4)


def test_the_cpu_still_goes_worker_by_worker(monkeypatch):
    from hf_attn_plugins.cqs import run_plan as forkjoin

    paths = []
    work = forkjoin.work
    monkeypatch.setattr(
        forkjoin, "work", lambda leaf, *args, **more: paths.append(leaf.path) or work(leaf, *args, **more)
    )
    cqs.attention(*draw(1, 36, 36), cqs.plan(36, 7), is_causal=True)
    assert paths == [(w,) for w in range(7)]
