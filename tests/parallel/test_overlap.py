"""Computing while messages are on their way: what is computed first, and that nothing is computed twice or left out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.cqs.planning.worker_share import Leaf
from hf_attn_plugins.kernels.bound_attend import BoundAttend
from hf_attn_plugins.parallel import cqs_exchange
from hf_attn_plugins.parallel.cqs_plan import rank_plan
from hf_attn_plugins.parallel.dense import Dense
from hf_attn_plugins.parallel.method import Step
from hf_attn_plugins.testing import dense_attention, sharp_inputs
from tests.parallel.threads import Board, on_threads

LENGTH = 23


def inputs(length: int = LENGTH) -> tuple[torch.Tensor, ...]:
    return sharp_inputs(2, 4, 2, length, length, 4, 6, dtype=torch.float64, sharpness=1.5)


def causal(length: int = LENGTH) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


@pytest.mark.parametrize("size", (2, 3, 4))
def test_packed_texts_see_themselves_only(size):
    query, key, value = inputs()
    texts = torch.stack([torch.arange(LENGTH) >= 9, torch.arange(LENGTH) % 23 >= 22]).long()
    visible = causal() & (texts[:, :, None] == texts[:, None, :])
    wanted, _ = dense_attention(query, key, value, visible[:, None])

    def one(group: Board) -> float:
        layout = Dense(exchange="gather").deal(torch.ones(2, LENGTH, dtype=torch.bool), group.rank, size)
        columns = layout.columns
        own = [x[:, :, columns[0]] for x in (query, key, value)]
        step = Step(0, columns, layout, None, False, texts=texts)
        with torch.no_grad():
            found = Dense(exchange="gather").attention(*own, (None, None), step, BoundAttend(0.5), group)
        return (found.out - wanted[:, :, columns[0]]).abs().max().item()

    assert max(on_threads(size, one)) <= 1e-12


class Noting(Board):
    """Notes what happens between the start of an exchange and the wait for it."""

    notes: list[str]

    def start_all_gather(self, *arguments, what=""):
        return self._noted(super().start_all_gather(*arguments, what=what))

    def start_all_to_all(self, *arguments, what=""):
        return self._noted(super().start_all_to_all(*arguments, what=what))

    def _noted(self, finish):
        self.notes.append("start")

        def wait():
            self.notes.append("wait")
            return finish()

        return wait


@pytest.mark.parametrize("name", ("dense", "cqs"))
@pytest.mark.parametrize("grads", (False, True))
def test_own_keys_are_attended_to_first_without_gradients(name, grads, monkeypatch):
    query, key, value = inputs()
    wanted, _ = dense_attention(query, key, value, causal())
    plan, notes = rank_plan(LENGTH, 2), {0: [], 1: []}

    def one(group: Board) -> float:
        group.__class__, group.notes = Noting, notes[group.rank]
        with torch.set_grad_enabled(grads):
            if name == "cqs":
                columns = torch.arange(*plan.shards[group.rank])
                own = [x[:, :, columns] for x in (query, key, value)]
                found = cqs_exchange.attention(*own, plan, group, scale=0.5)
            else:
                layout = Dense(exchange="gather").deal(torch.ones(2, LENGTH, dtype=torch.bool), group.rank, 2)
                columns = layout.columns[0]
                own = [x[:, :, columns] for x in (query, key, value)]
                step = Step(0, layout.columns, layout, None, False)
                kernel = Counting(0.5, notes=notes[group.rank])
                found = Dense(exchange="gather").attention(*own, (None, None), step, kernel, group)
        return (found.out - wanted[:, :, columns]).abs().max().item()

    work = cqs_exchange.work

    def noted(*arguments, **options):
        rank = 0 if arguments[0].path[0] in plan.workers(0) else 1
        notes[rank].append("compute")
        return work(*arguments, **options)

    monkeypatch.setattr(cqs_exchange, "work", noted)
    assert max(on_threads(2, one)) <= 1e-12
    for seen in notes.values():
        order = seen[: seen.index("compute") + 1]
        if grads:  # nothing is computed in two parts, whose results a backward pass would keep
            assert order in (["compute"], ["start", "wait", "compute"]), seen
        else:
            assert order == ["start", "compute"] and "wait" in seen, seen


class Counting(BoundAttend):
    """A kernel that notes its calls."""

    def __init__(self, scale: float, notes: list[str]) -> None:
        super().__init__(scale)
        object.__setattr__(self, "notes", notes)

    def with_kernel_for(self, *_):
        return self

    def __call__(self, *arguments):
        self.notes.append("compute")
        return super().__call__(*arguments)


@st.composite
def leaves(draw) -> Leaf:
    count = draw(st.integers(1, 5))
    keep = [[draw(st.booleans()) for _ in range(count)] for _ in range(count)]
    table = tuple(tuple(keep[max(i, j)][min(i, j)] for j in range(count)) for i in range(count))
    return Leaf((0,), tuple((3 * i, 3 * i + 2) for i in range(count)), table)


@given(leaves(), st.sets(st.integers(0, 4)))
@settings(deadline=None)
def test_a_leaf_is_split_into_all_of_its_pairs(leaf, chosen):
    first, rest = leaf.split(lambda span: span[0] // 3 in chosen)
    for i, row in enumerate(leaf.keep):
        for j, kept in enumerate(row):
            assert first.keep[i][j] == (kept and i in chosen and j in chosen)
            assert first.keep[i][j] + rest.keep[i][j] == kept
    for is_causal in (False, True):
        assert first.cells(is_causal) + rest.cells(is_causal) == leaf.cells(is_causal)


def test_a_mask_reaches_both_parts_of_cqs():
    query, key, value = inputs()
    real = torch.arange(LENGTH) >= torch.tensor([[0], [5]])
    wanted, _ = dense_attention(query, key, value, causal() & real[:, None, None])
    plan = rank_plan(LENGTH, 3)

    def one(group: Board) -> float:
        columns = slice(*plan.shards[group.rank])
        with torch.no_grad():
            own = [x[:, :, columns] for x in (query, key, value)]
            found = cqs_exchange.attention(*own, plan, group, scale=0.5, mask=Mask(causal=True, key_padding=real))
        return (found.out - wanted[:, :, columns]).abs().max().item()

    assert max(on_threads(3, one)) <= 1e-12
