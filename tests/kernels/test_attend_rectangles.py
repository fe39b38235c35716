"""Plans of pieces: the tables by hand, and block-sparse attention in one launch against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.core.rectangle import Rectangle, table
from hf_attn_plugins.kernels.attend_rectangles import attend_rectangles
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention, sharp_inputs
from tests.kernels.triton_cases import needs_interpreter, padding

STAR = [
    Rectangle(0, 20, 0, 20, True),
    Rectangle(20, 40, 0, 8),
    Rectangle(20, 40, 20, 40, True),
    Rectangle(40, 50, 0, 50, True),
]
PAIRS = [
    Rectangle(0, 13, 0, 13, True),
    Rectangle(26, 40, 0, 13),
    Rectangle(26, 40, 26, 40, True),
    Rectangle(40, 50, 30, 50, True),
]
PER_ROW = [STAR, [Rectangle(5, 45, 3, 40, True)], []]


def seen_by(plan, batch, rows, keys, start):
    """The plan's pairs, one by one."""
    seen = torch.zeros(batch, 1, rows, keys, dtype=torch.bool)
    lists = plan if plan and isinstance(plan[0], list) else [plan] * batch
    for b, pieces in enumerate(lists):
        for r0, r1, k0, k1, position_masked, shift in pieces:
            for t in range(r0, r1):
                for s in range(k0, k1):
                    seen[b, 0, t, s] |= not position_masked or s <= t + start + shift
    return seen


@pytest.mark.parametrize(
    ("plan", "kernel"),
    [
        pytest.param(STAR, None, id="star"),
        pytest.param(PAIRS, None, id="pairs"),
        pytest.param(PER_ROW, None, id="per row"),
        pytest.param(PER_ROW, "triton", id="per row, triton", marks=needs_interpreter),
    ],
)
def test_a_plan_is_what_its_pairs_say(plan, kernel):
    real = padding(3, 50)
    mask = Mask(causal=True, key_padding=real)
    seen = seen_by(plan, 3, 50, 50, 0) & real[:, None, None]
    weight = torch.randn(3, 2, 50, 16, dtype=torch.float64)
    results = []
    for dtype in (torch.float64, torch.float32, torch.float32):
        inputs = [x.requires_grad_() for x in sharp_inputs(3, 2, 1, 50, 50, 16, dtype=dtype, sharpness=2.0)]
        if len(results) < 2:
            out, lse = dense_attention(*inputs, seen)
        else:
            out, lse = attend_rectangles(*inputs, plan, mask=mask, kernel=kernel)
        results.append([out, lse.detach(), *torch.autograd.grad((out * weight.to(dtype)).sum(), inputs)])
    for name, ref, low, ours in zip(["out", "lse", "d_query", "d_key", "d_value"], *results, strict=True):
        if name == "lse":
            assert torch.equal(ours == -torch.inf, ref == -torch.inf)
            ref, low, ours = (torch.where(x == -torch.inf, 0, x) for x in (ref, low, ours))
        assert_close_to_reference(ours.detach(), low.detach(), ref.detach(), 4.0, name)


@needs_interpreter
def test_a_plan_is_one_launch_forward_and_three_backward():
    from hf_attn_plugins.kernels.triton import device as triton_device
    from hf_attn_plugins.kernels.triton import launch as triton_launch

    query, key, value = (x.to("meta") for x in sharp_inputs(3, 2, 1, 50, 50, 16))
    flat = tuple(number for piece in STAR for number in (0, *piece))
    call = triton_launch.Call(0.25, None, None, 0, 0, None, None, 0.0, None, None, flat)
    with triton_device.recording("sm90") as launches:
        out, _, row_lse = triton_launch.forward(query, key, value, call)
        assert len(launches) == 1
        triton_launch.backward(out, None, query, key, value, out, row_lse, call)
    assert [launch.kernel.__name__ for launch in launches] == [
        "forward_kernel",
        "delta_kernel",
        "dq_kernel",
        "dkdv_kernel",
    ]


def test_table_by_hand():
    plan = [[Rectangle(0, 4, 0, 2), Rectangle(4, 8, 0, 8, True)]]
    assert table(plan, 8, 4) == [[[(0, 4, 0, 2, 0, 0)], [(4, 8, 0, 8, 1, 0)]]]
    assert table(plan, 8, 4, of_keys=True) == [
        [[(0, 2, 0, 4, 0, 0), (0, 8, 4, 8, 1, 0)], [(0, 8, 4, 8, 1, 0), (0,) * 6]]
    ]
    assert table([[]], 8, 4) == [[[(0,) * 6], [(0,) * 6]]]


edges = st.integers(0, 40)


@given(
    st.lists(st.tuples(edges, edges, edges, edges, st.booleans()), max_size=6),
    st.sampled_from([1, 3, 16]),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_tables_name_every_pair_of_every_piece(pieces, tile, of_keys):
    plan = [Rectangle(*piece) for piece in pieces]
    wanted = sorted((t, s) for p in plan for t in range(p[0], p[1]) for s in range(p[2], p[3]))
    found = []
    for index, entries in enumerate(table([plan], 40, tile, of_keys=of_keys)[0]):
        for h0, h1, w0, w1, *_ in entries:
            for held in range(max(h0, index * tile), min(h1, index * tile + tile, 40)):
                found += [(w, held) if of_keys else (held, w) for w in range(w0, w1)]
    assert sorted(found) == wanted


def test_pieces_that_leave_the_scores_are_refused():
    query, key, value = sharp_inputs(2, 2, 1, 8, 8, 16)
    with pytest.raises(ValueError, match="8 rows and 8 keys"):
        attend_rectangles(query, key, value, [Rectangle(0, 9, 0, 8)])
    with pytest.raises(ValueError, match="one per row of the batch"):
        attend_rectangles(query, key, value, [[Rectangle(0, 8, 0, 8)]] * 3)


@pytest.mark.parametrize("plan", [[], [[], []], [[Rectangle(0, 8, 0, 8)], []]], ids=["shared", "per row", "one row"])
@pytest.mark.parametrize("kernel", [None, "flex", pytest.param("triton", marks=needs_interpreter)])
def test_rows_without_pieces_see_nothing(plan, kernel):
    query, key, value = sharp_inputs(2, 2, 1, 8, 8, 16)
    part = attend_rectangles(query, key, value, plan, kernel=kernel)
    empty = Partial.empty(query, 16)
    assert torch.equal(part.out[1], empty.out[1]) and torch.equal(part.lse[1], empty.lse[1])
    assert bool((part.lse[0] == -torch.inf).all()) == (plan in ([], [[], []]))
