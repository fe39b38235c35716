"""Every method over any number of ranks against the visibility matrix, pair by pair, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_plugins.kernels.bound_attend import BoundAttend
from hf_attn_plugins.parallel.decode import later
from hf_attn_plugins.parallel.dense import Dense
from hf_attn_plugins.parallel.method import Step, local_columns
from hf_attn_plugins.parallel.partition import level
from hf_attn_plugins.parallel.star import Star
from hf_attn_plugins.testing import dense_attention, sharp_inputs
from tests.parallel.threads import on_threads

HEADS, KV_HEADS, DIM, DIM_V = 4, 2, 4, 6
SETTINGS = settings(deadline=None, max_examples=60)


def allowed(method, real: torch.Tensor, window: int | None) -> torch.Tensor:
    """(B, HEADS, L, L): who sees whom, from the definition of the plan."""
    batch, length = real.shape
    seen = torch.zeros(batch, HEADS, length, length, dtype=torch.bool)
    dense = [
        HEADS // KV_HEADS * head + i for head in getattr(method, "layer_heads", ()) for i in range(HEADS // KV_HEADS)
    ]
    for row in range(batch):
        places = real[row].nonzero()[:, 0].tolist()
        if not places:
            continue
        first, plan = places[0], None
        if isinstance(method, Star):
            plan = method.plan_of(len(places))
        for q in places if plan else range(length):
            for k in places:
                near = k <= q and (window is None or q - k <= window)
                seen[row, :, q, k] = near and (plan is None or plan.may_attend(q - first, k - first))
                seen[row, dense, q, k] = near
    return seen


def compare(
    method, real: torch.Tensor, size: int, window: int | None, then: tuple[int, ...] = (), grads: bool = True
) -> None:
    """A prompt, then forwards over `then` new tokens, on `size` ranks against the oracle."""
    (batch, length), total = real.shape, real.shape[1] + sum(then)
    query, key, value = sharp_inputs(
        batch, HEADS, KV_HEADS, total, total, DIM, DIM_V, dtype=torch.float64, sharpness=1.5
    )
    kernel, bounds = BoundAttend(DIM**-0.5), (window, None)
    wanted, _ = dense_attention(
        query[:, :, :length], key[:, :, :length], value[:, :, :length], allowed(method, real, window)
    )

    def rank_works(group):
        with torch.set_grad_enabled(grads):  # a thread begins with gradients
            return rank_computes(group)

    def rank_computes(group):
        layout = method.deal(real, group.rank, size)
        if layout is None:
            return None
        columns = local_columns(real, layout.columns)
        place = layout.columns.clamp_min(0)[:, None, :, None]
        own = [x.gather(2, place.expand(-1, x.shape[1], -1, x.shape[3])) for x in (query, key, value)]
        step = Step(0, columns, layout, None, True)
        out = method.attention(*own, bounds, step, kernel, group).out
        held, kept = columns[:, layout.stored], [x[:, :, layout.stored] for x in own[1:]]
        loads, first, later_outs = list(layout.loads), length, []
        assert loads[group.rank] == held.shape[1]
        for count in then:
            share = level(loads, count)[group.rank]
            loads = [load + len(run) for load, run in zip(loads, level(loads, count), strict=True)]
            new = torch.arange(first, first + count).expand(batch, -1)
            held = torch.cat([held, new[:, share.start : share.stop]], 1)
            fresh = slice(first + share.start, first + share.stop)
            kept = [torch.cat([old, x[:, :, fresh]], 2) for old, x in zip(kept, (key, value), strict=True)]
            step = Step(first, new, None, held, True, (share,))
            later_outs.append(later(query[:, :, first : first + count], *kept, bounds, step, kernel, group).out)
            first += count
        return layout, out, held, later_outs

    results = on_threads(size, rank_works)
    if results[0] is None:
        assert all(result is None for result in results), "all ranks must take the same way"
        return
    answered = torch.zeros(batch, total, dtype=torch.long)
    stored = torch.zeros(batch, total, dtype=torch.long)
    for layout, out, held, _ in results:
        assert out.isfinite().all(), "a slot without a token must not poison the next layer"
        for row in range(batch):
            for slot in layout.reported.tolist():
                column = int(layout.columns[row, slot])
                if column >= 0:
                    answered[row, column] += 1
                    error = (out[row, :, slot] - wanted[row, :, column]).abs().max().item()
                    assert error <= 1e-10, (column, error)
            for column in held[row].tolist():
                stored[row, column] += column >= 0
    everything = torch.cat([real.long(), torch.ones(batch, sum(then), dtype=torch.long)], 1)
    due = real if isinstance(method, Star) else torch.ones_like(real)  # exact methods compute padding, as sdpa does
    assert torch.equal(answered[:, :length], due.long()), "every row is answered for by one rank"
    assert torch.equal(stored, everything), "every key lies on one rank"
    first = length
    for index, count in enumerate(then):
        end = first + count
        position = torch.arange(total)
        seen = everything[:, None, None, :end].bool() & (position[:end] <= position[first:end, None])
        if window is not None:
            seen = seen & (position[first:end, None] - position[:end] <= window)
        wanted, _ = dense_attention(query[:, :, first:end], key[:, :, :end], value[:, :, :end], seen)
        for _, _, _, outs in results:
            assert (outs[index] - wanted).abs().max().item() <= 1e-10
        first = end


@st.composite
def padded(draw):
    """(B, L) real tokens: padding on the left, on the right, or none; whole rows of it too."""
    length, batch = draw(st.integers(1, 24)), draw(st.integers(1, 3))
    rows = []
    for _ in range(batch):
        left = draw(st.integers(0, length))
        right = draw(st.integers(0, length - left))
        rows.append([left <= place < length - right for place in range(length)])
    return torch.tensor(rows)


SIZE, WINDOW, THEN = st.integers(1, 5), st.none() | st.integers(0, 12), st.lists(st.integers(1, 5), max_size=3)


@given(padded(), SIZE, WINDOW, THEN, st.integers(1, 10), st.integers(0, 10), st.integers(0, 26), st.booleans())
@SETTINGS
def test_star(real, size, window, then, block, anchor, query, broadcast):
    method = Star(block, min(anchor, block), query, anchor="broadcast" if broadcast else "recompute")
    compare(method, real, size, window, tuple(then))


HALO, HEADS_BY_LAYER = st.integers(1, 26), st.sampled_from((None, ((0,),), ((1,),), ((0, 1),)))


@given(
    padded(),
    SIZE,
    WINDOW,
    st.integers(1, 10),
    st.integers(0, 36),
    st.integers(0, 9),
    HALO,
    HEADS_BY_LAYER,
    st.booleans(),
)
@SETTINGS
def test_star_with_near_tokens_and_dense_heads(real, size, window, block, anchor, query, halo, heads, broadcast):
    """Halos shorter and longer than a rank's run, ranks without a block, anchors that reach beyond rank 0."""
    sizes = dict(block_size=block, anchor_size=min(anchor, block + halo), query_size=query, halo_size=halo)
    method = Star(**sizes, dense_heads=heads, anchor="broadcast" if broadcast else "recompute")
    compare(method, real, size, window, (2,))


@given(padded(), SIZE, WINDOW, THEN, st.sampled_from(("gather", "heads")), st.booleans())
@SETTINGS
def test_dense(real, size, window, then, exchange, grads):
    """Keys gathered; heads exchanged, 4 of them over up to 5 ranks."""
    compare(Dense(exchange=exchange), real, size, window, tuple(then), grads)


@given(padded(), SIZE)
@SETTINGS
def test_dense_computes_while_keys_are_on_their_way(real, size):
    compare(Dense(exchange="gather"), real, size, None, grads=False)


def test_the_query_sees_the_last_keys_of_every_shard():
    """Defect D1 of the original: a causal mask over foreign shards hid the last m - 1 - i keys from query token i."""
    real = torch.ones(1, 40, dtype=torch.bool)
    for size in (1, 2, 4):
        compare(Star(8, 4, 8), real, size, None)


def test_padding_between_tokens_is_refused():
    real = torch.tensor([[True, False, True]])
    with pytest.raises(NotImplementedError, match="not between tokens"):
        Star().deal(real, 0, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        (dict(anchor="sometimes"), "anchor='sometimes' is unknown"),
        (dict(block_size=4, anchor_size=5), "anchor_size=5 is larger than block_size=4"),
        (dict(blocks=3), "has no option blocks"),
        (dict(shape=None), "has no option shape"),
    ),
)
def test_options_are_validated(options, message):
    from hf_attn_plugins.parallel.method import method_for as method

    with pytest.raises(ValueError, match=message):
        method("star_attention", **options)


def test_a_method_that_does_not_exist_is_told():
    from hf_attn_plugins.parallel.method import method_for as method

    with pytest.raises(
        ValueError, match="'sdpa' does not run on several ranks: choose one of tiled_attention, star_attention"
    ):
        method("sdpa")
