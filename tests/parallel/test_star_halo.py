"""Star's near tokens and dense heads on several ranks: chosen cases, the keys that are sent, kernels."""

from __future__ import annotations

import threading

import pytest
import torch

from hf_attn_plugins.cqs.planning.cost import CallShape
from hf_attn_plugins.kernels.attend_rectangles import attend_rectangles
from hf_attn_plugins.kernels.bound_attend import BoundAttend
from hf_attn_plugins.kernels.cpu_fused import build as fused
from hf_attn_plugins.parallel import Group, star
from hf_attn_plugins.parallel.method import Step
from hf_attn_plugins.parallel.star import Star
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention, sharp_inputs
from tests.kernels.triton_cases import needs_interpreter
from tests.parallel.test_methods import allowed, compare
from tests.parallel.threads import on_threads

LENGTH, BLOCK, QUERY = 28, 4, 4  # 24 tokens of context in 6 blocks
PADDED = torch.arange(LENGTH) >= torch.tensor([[0], [5], [LENGTH]])
# halo, anchor, ranks, and the tokens that every rank receives from each rank, for a prompt without padding
CASES = {
    "within the neighbour's run": (3, 4, 3, [[0, 0, 0], [3, 0, 0], [0, 3, 0]]),
    "the neighbour's whole run": (8, 4, 3, [[0, 0, 0], [8, 0, 0], [0, 8, 0]]),
    "longer than a run": (11, 4, 3, [[0, 0, 0], [8, 0, 0], [3, 8, 0]]),
    "longer than the prompt": (40, 4, 3, [[0, 0, 0], [8, 0, 0], [8, 8, 0]]),
    "no anchor": (6, 0, 2, [[0, 0], [6, 0]]),
    "ranks without a block": (5, 4, 7, [[0] * 7, [4, *[0] * 6], *([0] * i + [1, 4] + [0] * (5 - i) for i in range(4))]),
}
CASES["ranks without a block"][3].append([0] * 7)


@pytest.mark.parametrize(
    ("anchor", "heads"),
    (("recompute", None), ("broadcast", None), ("broadcast", ((1,),)), ("recompute", ((0, 1),))),
)
@pytest.mark.parametrize("case", CASES)
def test_each_rank_sees_its_plan(case, anchor, heads):
    halo, anchor_size, size, _ = CASES[case]
    method = Star(BLOCK, anchor_size, QUERY, halo, heads, anchor=anchor)
    for real in (torch.ones(2, LENGTH, dtype=torch.bool), PADDED, PADDED.flip(1)):
        compare(method, real, size, None, (1, 3))
    compare(method, PADDED, size, 9)


@pytest.mark.parametrize("halo", (9, 12))
def test_an_anchor_that_reaches_beyond_the_first_rank(halo):
    """Rank 0 has 8 of the anchor's tokens and broadcasts these; the others are part of the halo of later ranks."""
    compare(Star(BLOCK, BLOCK + halo, QUERY, halo, anchor="broadcast"), PADDED, 3, None)
    method = Star(BLOCK, 9, QUERY, 5, anchor="broadcast")
    row = method.deal(torch.ones(1, LENGTH, dtype=torch.bool), 2, 3).extra.rows[0]
    assert (row.own, row.anchor, row.halo) == (range(16, 24), range(8), range(8, 16))
    compare(method, PADDED, 3, None)


def exchanged(method, size):
    """On every rank: the calls, bytes sent and received of halos; and sent and received by the formula, merge apart."""
    shape = CallShape(heads=4, kv_heads=2, head_dim=4, head_dim_v=6, itemsize=8, batch=2)
    real, merged = torch.ones(2, LENGTH, dtype=torch.bool), (size - 1) * QUERY * shape.result_bytes

    def work(group):
        layout = method.deal(real, group.rank, size)
        inputs = sharp_inputs(2, 4, 2, *layout.columns.shape[1:] * 2, 4, 6, dtype=torch.float64)
        method.attention(*inputs, (None, None), Step(0, layout.columns, layout, None, False), BoundAttend(1.0), group)
        cost, halos = method.cost(layout, group.rank, shape), group.traffic["halo"]
        return [halos.calls, halos.sent, halos.received, cost.sent - merged, cost.received - merged]

    return shape.key_bytes, on_threads(size, work)


@pytest.mark.parametrize("case", CASES)
def test_halos_are_sent_as_counted(case):
    """In one exchange every rank sends the keys and values of its tokens that lie in another rank's halo."""
    halo, anchor, size, tokens = CASES[case]
    each, found = exchanged(Star(BLOCK, anchor, QUERY, halo, anchor="recompute"), size)
    for rank, counted in enumerate(found):
        sent, received = sum(row[rank] for row in tokens) * each, sum(tokens[rank]) * each
        assert counted == [1, sent, received, sent, received]


def test_dense_heads_send_their_own_keys_only():
    """Of two key heads one is dense: it needs the tokens between anchor and blocks, which are 4 and 12 on 3 ranks."""
    method = Star(BLOCK, 4, QUERY, 3, ((), (1,)), anchor="recompute")
    each, found = exchanged(method.for_layer(0), 3)
    assert [counted[2] for counted in found] == [0, 3 * each, 3 * each]
    each, found = exchanged(method.for_layer(1), 3)
    assert [counted[2] for counted in found] == [0, (3 + 4) * each // 2, (3 + 12) * each // 2]
    assert all(counted[1:3] == counted[3:] and counted[0] == 2 for counted in found)


def test_without_a_halo_nothing_is_exchanged():
    method, real = Star(BLOCK, 4, QUERY, anchor="recompute"), torch.ones(1, LENGTH, dtype=torch.bool)
    assert not method.deal(real, 1, 3).extra.sparse.is_exchanged


def test_a_dense_head_that_a_layer_does_not_have_is_refused():
    method, real = Star(BLOCK, 4, QUERY, dense_heads=((2,),)), torch.ones(1, LENGTH, dtype=torch.bool)
    step, inputs = Step(0, real, method.deal(real, 0, 1), None, False), sharp_inputs(1, 4, 2, LENGTH, LENGTH, 4)
    with pytest.raises(ValueError, match=r"dense_heads names key head 2: this layer has heads 0 \.\. 1"):
        method.attention(*inputs, (None, None), step, BoundAttend(1.0), Group.alone())


@pytest.mark.parametrize(
    ("kernel", "dtype"),
    (
        (None, torch.bfloat16),  # one call per rectangle, merged
        pytest.param("triton", torch.float32, marks=needs_interpreter),
        pytest.param(
            "cpu_fused", torch.bfloat16, marks=pytest.mark.skipif(bool(fused.unavailable()), reason="no C kernels")
        ),
    ),
)
def test_kernels_within_the_error_rule(kernel, dtype, monkeypatch):
    lock = threading.Lock()

    def one_at_a_time(*args, **options):  # Triton's interpreter does not work in two threads at once
        with lock:
            return attend_rectangles(*args, **options)

    monkeypatch.setattr(star, "attend_rectangles", one_at_a_time)
    real = torch.arange(60) >= torch.tensor([[0], [17]])
    method = Star(16, 20, 10, 7, ((1,),), anchor="broadcast")
    inputs = sharp_inputs(2, 4, 2, 60, 60, 16, dtype=dtype)
    seen = allowed(method, real, 40)
    wanted, low = dense_attention(*(x.double() for x in inputs), seen)[0], dense_attention(*inputs, seen)[0]

    def work(group):
        layout = method.deal(real, group.rank, 3)
        place = layout.columns.clamp_min(0)[:, None, :, None]
        own = [x.gather(2, place.expand(-1, x.shape[1], -1, x.shape[3])) for x in inputs]
        step = Step(0, layout.columns, layout, None, True)
        return layout, method.attention(*own, (40, None), step, BoundAttend(0.25, name=kernel), group).out

    for layout, out in on_threads(3, work):
        for index, columns in enumerate(layout.columns):
            slots = [slot for slot in layout.reported.tolist() if columns[slot] >= 0]
            there = columns[slots]
            found = out[index][:, slots]
            assert_close_to_reference(found, low[index][:, there], wanted[index][:, there])
