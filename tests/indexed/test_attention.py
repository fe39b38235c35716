"""Indexed attention against the definition, word by word."""

from __future__ import annotations

import pytest
import torch

from hf_attn_plugins.indexed import (
    Projections,
    build_tables,
    direct_attention,
    indexed_attention,
    indexed_scores,
    indexed_values,
    pooled_values,
    sinusoids,
)
from hf_attn_plugins.indexed import attention as attention_module
from hf_attn_plugins.indexed.attention import column_weights
from hf_attn_plugins.indexed.direct import direct_scores, project_direct, project_indexed
from hf_attn_plugins.indexed.tables import project_tables
from hf_attn_plugins.testing import assert_close_to_reference

from .cases import draw, draw_words, oracle

SHAPES = [  # words, length, characters, width, heads, head_dim
    (1, 1, 2, 4, 1, 4),
    (5, 7, 11, 16, 2, 8),
    (7, 6, 5, 12, 3, 12),  # each head as wide as the embedding
    (4, 3, 90, 8, 2, 4),  # many characters for the length: scores are looked up one by one
]


def cast(weights: Projections | None, dtype: torch.dtype) -> Projections | None:
    return None if weights is None else Projections(*(weight.to(dtype) for weight in weights))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding_index", [None, 0])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape, padding_index, tied):
    words, length, characters, width, heads, dim = shape
    table, positions, own, of_positions = draw(characters, length, width, heads * dim, tied=tied)
    indices = draw_words(words, length, characters)
    ref = oracle(table, positions, indices, own, of_positions, heads, padding_index)
    direct = direct_attention(table, positions, indices, own, of_positions, heads=heads, padding_index=padding_index)
    torch.testing.assert_close(direct, ref, rtol=1e-10, atol=1e-10)
    by_index = indexed_attention(
        build_tables(table, positions, own, of_positions, heads=heads), indices, padding_index=padding_index
    )
    torch.testing.assert_close(by_index, ref, rtol=1e-10, atol=1e-10)
    for dtype in (torch.float32, torch.bfloat16):
        tables = [x.to(dtype) for x in (table, positions)]
        low_own, low_positions = cast(own, dtype), cast(of_positions, dtype)
        low = direct_attention(*tables, indices, low_own, low_positions, heads=heads, padding_index=padding_index)
        out = indexed_attention(
            build_tables(*tables, low_own, low_positions, heads=heads), indices, padding_index=padding_index
        )
        # Of a few dozen numbers, the worst error of the direct form is a matter of luck, and of the CPU.
        assert_close_to_reference(out, low, ref, 3.0 if out.numel() < 100 else 2.0)


def test_the_softmax_of_the_tests_is_sharp():
    table, positions, own, of_positions = draw(11, 7, 16, 16, tied=False)
    scores = indexed_scores(build_tables(table, positions, own, of_positions), draw_words(5, 7, 11))
    assert scores.softmax(-1).amax() > 0.9


@pytest.mark.parametrize("tied", [True, False])
def test_projecting_first_equals_indexing_first(tied):
    table, positions, own, of_positions = draw(11, 7, 16, 16, tied=tied)
    indices = draw_words(5, 7, 11)
    first = project_direct(table, positions, indices, own, of_positions, 2)
    rows = project_tables(table, positions, own, of_positions, 2)
    for index_first, project_first in zip(first, project_indexed(rows, indices, 11), strict=True):
        torch.testing.assert_close(project_first, index_first, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_both_ways_of_indexing_scores_equal_the_products(shape, monkeypatch):
    words, length, characters, width, heads, dim = shape
    table, positions, own, of_positions = draw(characters, length, width, heads * dim, tied=False)
    indices = draw_words(words, length, characters)
    query, key, _ = project_direct(table, positions, indices, own, of_positions, heads)
    tables = build_tables(table, positions, own, of_positions, heads=heads)
    for whole_rows in (0, characters):
        monkeypatch.setattr(attention_module, "WHOLE_ROWS", whole_rows)
        torch.testing.assert_close(indexed_scores(tables, indices), direct_scores(query, key), rtol=1e-11, atol=1e-11)


def test_scale_is_that_of_the_scores():
    table, positions, own, _ = draw(11, 7, 16, 16, tied=True)
    indices = draw_words(5, 7, 11)
    by_index = indexed_attention(build_tables(table, positions, own, heads=2, scale=0.3), indices)
    direct = direct_attention(table, positions, indices, own, heads=2, scale=0.3)
    torch.testing.assert_close(by_index, direct, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(by_index, indexed_attention(build_tables(table, positions, own, heads=2), indices))


def test_pooling_by_table_equals_pooling_built_values():
    table, positions, own, of_positions = draw(11, 7, 16, 16, tied=False)
    tables, indices = build_tables(table, positions, own, of_positions, heads=2), draw_words(5, 5, 11)
    weights = column_weights(indexed_scores(tables, indices))
    built = torch.einsum("whl,whld->whd", weights, indexed_values(tables, indices))
    torch.testing.assert_close(pooled_values(tables, indices, weights), built, rtol=1e-12, atol=1e-12)


def test_shorter_words_need_no_other_tables():
    table, positions, own, of_positions = draw(11, 9, 16, 16, tied=False)
    tables, indices = build_tables(table, positions, own, of_positions), draw_words(6, 4, 11)
    padded = torch.nn.functional.pad(indices, (0, 5))
    short, long = (indexed_attention(tables, x, padding_index=0) for x in (indices, padded))
    torch.testing.assert_close(short, long, rtol=1e-12, atol=1e-12)


def test_words_are_taken_in_pieces(monkeypatch):
    table, positions, own, of_positions = draw(11, 7, 16, 16, tied=False)
    tables, indices = build_tables(table, positions, own, of_positions), draw_words(10, 7, 11)
    whole = indexed_attention(tables, indices, padding_index=0)
    sizes = []
    monkeypatch.setattr(attention_module, "PIECE", 3 * 7 * 18)
    inner = attention_module.indexed_scores
    monkeypatch.setattr(attention_module, "indexed_scores", lambda t, x: sizes.append(len(x)) or inner(t, x))
    torch.testing.assert_close(indexed_attention(tables, indices, padding_index=0), whole, rtol=1e-12, atol=1e-12)
    assert sizes == [3, 3, 3, 1]


def test_no_words_give_no_rows():
    table, positions, own, _ = draw(11, 7, 16, 16, tied=True)
    tables, none = build_tables(table, positions, own, heads=2), torch.zeros(0, 7, dtype=torch.int64)
    assert indexed_attention(tables, none).shape == (0, 2, 8)


def test_int32_indices_are_accepted():
    table, positions, own, _ = draw(11, 7, 16, 16, tied=True)
    tables, indices = build_tables(table, positions, own), draw_words(3, 7, 11)
    torch.testing.assert_close(indexed_attention(tables, indices.int()), indexed_attention(tables, indices))


def test_a_column_mask_of_padding_alone_gives_zero_not_nan():
    weights = column_weights(torch.randn(2, 3, 1, 3), torch.tensor([[True, True, False], [False, False, False]]))
    torch.testing.assert_close(weights.sum(-1), torch.tensor([[1.0], [0.0]]))
    assert weights[0, 0, 2] == 0


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        (torch.zeros(2, 8, dtype=torch.int64), "positions for 1 to 7"),
        (torch.zeros(2, 0, dtype=torch.int64), "positions for 1 to 7"),
        (torch.zeros(2, 7), "int64 or int32"),
        (torch.zeros(7, dtype=torch.int64), "(W, L)"),
    ],
)
def test_bad_words_are_refused(indices, message):
    table, positions, own, _ = draw(11, 7, 16, 16, tied=True)
    with pytest.raises(ValueError) as refusal:
        indexed_attention(build_tables(table, positions, own), indices)
    assert message in str(refusal.value)
    with pytest.raises(ValueError):
        direct_attention(table, positions, indices, own)


def test_bad_weights_are_refused():
    table, positions, own, _ = draw(11, 7, 16, 16, tied=True)
    with pytest.raises(ValueError, match="one width"):
        build_tables(table, positions[:, :8], own)
    with pytest.raises(ValueError, match="heads=3"):
        build_tables(table, positions, own, heads=3)


def test_sinusoids_are_those_of_the_seed():
    table = sinusoids(9, 6)
    for position in range(9):
        for column in range(6):
            phase = torch.tensor(position * 1e4 ** (-(column // 2) / 3), dtype=torch.float64)
            wanted = phase.sin() if column % 2 == 0 else phase.cos()
            assert abs(table[position, column] - wanted) < 1e-6
    assert sinusoids(4, 5).shape == (4, 5)
