"""The planner against its definition, written out pair by pair."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_plugins.star.options import StarOptions
from hf_attn_plugins.star.plan import DENSE_BELOW, Plan, plan_for


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    block, halo = draw(st.integers(1, 12)), draw(st.integers(0, 30))
    anchor = draw(st.integers(0, block + halo))
    return Plan(draw(st.integers(0, 50)), block, anchor, draw(st.integers(0, 60)), halo)


def defined(plan: Plan, i: int, j: int) -> bool:
    """Section 2 of the paper, from token lists, and the tokens just before a block."""
    if j > i:
        return False
    tokens = list(range(plan.length))
    cut = max(0, plan.length - plan.query_size)
    context, query = tokens[:cut], tokens[cut:]
    if i in query:
        return True
    blocks = [context[k : k + plan.block_size] for k in range(0, len(context), plan.block_size)]
    mine = next(block for block in blocks if i in block)
    halo = context[max(0, mine[0] - plan.halo_size) : mine[0]]
    return j in mine or j in halo or j in context[: plan.anchor_size]


@settings(deadline=None, max_examples=80)
@given(plans())
def test_definition_self_and_closed_form(plan: Plan) -> None:
    pairs = 0
    for i in range(plan.length):
        assert plan.may_attend(i, i)
        for j in range(plan.length):
            assert plan.may_attend(i, j) == defined(plan, i, j)
            pairs += plan.may_attend(i, j)
    assert pairs == plan.attended_pairs()
    assert plan.causal_pairs() == plan.length * (plan.length + 1) // 2
    assert plan.is_dense == (plan.attended_pairs() == plan.causal_pairs())


@settings(deadline=None, max_examples=80)
@given(plans())
def test_blocks_tile_the_context(plan: Plan) -> None:
    blocks = list(plan.blocks())
    assert [i for block in blocks for i in block] == list(range(plan.context))
    assert [*range(plan.context), *plan.query] == list(range(plan.length))
    assert all(len(block) == plan.block_size for block in blocks[:-1])
    assert all(block for block in blocks)


@settings(deadline=None, max_examples=80)
@given(plans(), st.integers(0, 30))
def test_a_longer_context_extends_the_plan(plan: Plan, more: int) -> None:
    longer = plan.extended(plan.length + more)
    assert [b for b in plan.blocks() if len(b) == plan.block_size] == list(longer.blocks())[
        : plan.context // plan.block_size
    ]
    for i in range(plan.context):
        assert [plan.may_attend(i, j) for j in range(plan.length)] == [
            longer.may_attend(i, j) for j in range(plan.length)
        ]


def test_edges() -> None:
    assert list(Plan(0, 4, 4).blocks()) == [] and Plan(0, 4, 4).attended_pairs() == 0
    assert Plan(1, 4, 4, 1).attended_pairs() == 1
    assert Plan(9, 2, 1, 9).is_dense and Plan(9, 2, 1, 100).attended_pairs() == 45
    assert not Plan(9, 8, 7).is_dense and Plan(9, 8, 8).is_dense and Plan(9, 8, 7, 1).is_dense
    assert not Plan(4, 2, 1).may_attend(9, 0) and not Plan(4, 2, 1).may_attend(1, -1)


@pytest.mark.parametrize(
    "sizes", [(8, 4, 5, 0), (8, 0, 0, 0), (-1, 4, 4, 0), (8, 4, -1, 0), (8, 4, 4, -1), (8, 4.0, 4, 0)]
)
def test_sizes_out_of_range(sizes: tuple) -> None:
    with pytest.raises(ValueError, match=r"anchor_size|block_size|length|query_size"):
        Plan(*sizes)


def test_an_anchor_longer_than_a_block_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="anchor_size <= block_size"):
        StarOptions(block_size=8, anchor_size=9)


@settings(deadline=None, max_examples=80)
@given(st.integers(0, 300_000))
def test_defaults(length: int) -> None:
    plan = plan_for(length)
    assert plan.is_dense == (length < DENSE_BELOW)
    assert 0 <= plan.anchor_size <= plan.block_size + plan.halo_size
    paper = plan_for(length, preset="paper")
    assert paper.is_dense == (length < DENSE_BELOW) and paper.halo_size == 0 and paper.num_blocks <= 4


def test_sizes_given_alone_are_the_papers() -> None:
    assert plan_for(8192, 1024) == Plan(8192, 1024, 256, 128) == plan_for(8192, 1024, preset="paper")
    assert plan_for(8192, preset="paper") == Plan(8192, 2048, 512, 128)
    assert plan_for(8192, 128, halo_size=448) == Plan(8192, 128, 64, 128, 448)
    with pytest.raises(ValueError, match="preset='best' is unknown"):
        StarOptions(preset="best")


@pytest.mark.parametrize("length", [0, 1, 100, 5000])
@pytest.mark.parametrize("anchor", [0, 7, 3000])
def test_a_given_anchor_fits_the_default_block(length: int, anchor: int) -> None:
    assert plan_for(length, anchor_size=anchor).anchor_size == anchor
