"""The stateless form against the definition of the pattern, pair by pair."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.kernels.cpu_fused import build as fused
from hf_attn_plugins.star.batch_plans import row_sizes
from hf_attn_plugins.star.entry import attention
from hf_attn_plugins.star.options import StarOptions
from hf_attn_plugins.star.plan import DENSE_BELOW, plan_for
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention, sharp_inputs

PAPER = [(4, 4, 3), (8, 3, 5), (5, 0, 1), (7, 7, 0), (1, 1, 2), (100, 10, 3), (6, 2, 100)]
HALOS = [(4, 4, 3, 2), (3, 2, 4, 9), (1, 1, 2, 6), (5, 0, 0, 5), (7, 12, 3, 6), (4, 2, 3, 40)]
CASES = [*PAPER, *HALOS]


SEGMENTS = torch.tensor([[0] * 100 + [1] * 150, [4] * 250])


def star(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, options: StarOptions, softcap: float | None = None
) -> Partial:
    scale = query.shape[-1] ** -0.5
    return attention(query, key, value, mask, scale=scale, softcap=softcap, dropout=0.0, options=options)


def pattern(
    prompts: list[tuple[int, int]], rows: int, keys: int, options: StarOptions, window: int | None = None
) -> Tensor:
    """(1, 1 or HEADS, rows, keys): the pattern of prompts that lie at (first, end) of one row of the batch.

    Of four query heads two share a key head; the heads differ where one of the two key heads is dense.
    """
    seen = torch.zeros(1, 1, rows, keys, dtype=torch.bool)
    causal = seen.clone()
    for first, end in prompts:
        plan = options.plan_of(end - first)
        for i in range(plan.length):
            for j in range(i + 1):
                near = window is None or i - j < window
                causal[0, 0, first + i, first + j] = near
                seen[0, 0, first + i, first + j] = near and plan.may_attend(i, j)
    if not options.layer_heads:
        return seen
    return torch.cat([causal if head // 2 in options.layer_heads else seen for head in range(4)], 1)


def check(query: Tensor, key: Tensor, value: Tensor, part: Partial, seen: Tensor, softcap: float | None = None) -> None:
    wide = [x.double() for x in (query, key, value)]
    out, lse = dense_attention(*wide, seen, softcap=softcap)
    low, low_lse = dense_attention(query, key, value, seen, softcap=softcap)
    assert part.out.shape == out.shape and part.out.dtype == query.dtype and part.out.isfinite().all()
    assert_close_to_reference(part.out, low, out, factor=3 if softcap else 2)
    assert torch.equal(part.lse == -torch.inf, lse == -torch.inf)
    rows = lse > -torch.inf
    assert_close_to_reference(part.lse[rows], low_lse[rows], lse[rows], factor=3 if softcap else 2)


@pytest.mark.parametrize("sizes", CASES)
@pytest.mark.parametrize("length", [1, 2, 5, 23, 40])
def test_pattern(sizes: tuple[int, int, int], length: int) -> None:
    inputs = sharp_inputs(2, 4, 2, length, length, 16, 8, dtype=torch.float64)
    options = StarOptions(*sizes)
    out, lse = star(*inputs, Mask(causal=True), options)
    expected, expected_lse = dense_attention(*inputs, pattern([(0, length)], length, length, options))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_dtypes_and_softcap(dtype: torch.dtype, softcap: float | None) -> None:
    inputs = sharp_inputs(2, 4, 2, 83, 83, 32, dtype=dtype)
    options = StarOptions(16, 8, 10)
    part = star(*inputs, Mask(causal=True), options, softcap)
    check(*inputs, part, pattern([(0, 83)], 83, 83, options), softcap)


SITUATIONS = {
    "plain": (Mask(), [[(0, 250)]], None),
    "windowed": (Mask(window=(69, None)), [[(0, 250)]], 70),
    "padded": (Mask(key_padding=torch.arange(250)[None] >= torch.tensor([[0], [37]])), [[(0, 250)], [(37, 250)]], None),
    "packed": (
        Mask(query_segments=SEGMENTS, key_segments=SEGMENTS),
        [[(0, 100), (100, 250)], [(0, 250)]],
        None,
    ),
}


@pytest.mark.parametrize("kernel", ["cpu_tiled", "cpu_fused"])
@pytest.mark.parametrize("sizes", [(100, 0, 20), (64, 64, 32, 70), (32, 16, 20, 96)])
@pytest.mark.parametrize("heads", [(), (1,)])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_bfloat16_forward_and_gradients(kernel: str | None, sizes: tuple, heads: tuple, situation: str) -> None:
    if kernel == "cpu_fused" and fused.unavailable() is not None:
        pytest.skip(f"cpu_fused: {fused.unavailable()}")
    mask, spans, window = SITUATIONS[situation]
    inputs = [x.requires_grad_() for x in sharp_inputs(2, 4, 2, 250, 250, 32, 48, dtype=torch.bfloat16)]
    options = StarOptions(*sizes, dense_heads=[heads], kernel=kernel)
    seen = torch.cat([pattern(prompts, 250, 250, options, window) for prompts in spans])
    part = star(*inputs, mask.replace(causal=True), options)
    check(*[x.detach() for x in inputs], part, seen)
    weight = torch.randn(part.out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    low = [x.detach().requires_grad_() for x in inputs]
    got = torch.autograd.grad((part.out * weight).sum(), inputs)
    expected = torch.autograd.grad((dense_attention(*wide, seen)[0] * weight).sum(), wide)
    plain = torch.autograd.grad((dense_attention(*low, seen)[0] * weight).sum(), low)
    for one, other, reference in zip(got, plain, expected, strict=True):
        assert_close_to_reference(one, other, reference, factor=3)


@pytest.mark.parametrize("window", [1, 3, 9, 30])
@pytest.mark.parametrize("sizes", CASES)
def test_windows_are_intersected(window: int, sizes: tuple[int, int, int]) -> None:
    inputs = sharp_inputs(1, 4, 2, 37, 37, 16, dtype=torch.float64)
    options = StarOptions(*sizes)
    out, _ = star(*inputs, Mask(causal=True, window=(window - 1, None)), options)
    expected, _ = dense_attention(*inputs, pattern([(0, 37)], 37, 37, options, window))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_a_head_that_is_not_there_is_named() -> None:
    inputs = sharp_inputs(1, 4, 2, 20, 20, 16)
    with pytest.raises(ValueError, match=r"key head 2.*heads 0 \.\. 1"):
        star(*inputs, Mask(causal=True), StarOptions(4, 2, 3, dense_heads=[[2]]))


@pytest.mark.parametrize("general", ["bias by head", "predicate"])
def test_dense_heads_beside_what_no_plan_knows(general: str) -> None:
    inputs = sharp_inputs(2, 4, 2, 20, 20, 16, dtype=torch.float64)
    options = StarOptions(4, 2, 3, dense_heads=[[1]])
    given = torch.rand(2, 4, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.7
    mask = Mask(causal=True, bias=given)
    if general == "predicate":
        given = (torch.arange(20)[:, None] - torch.arange(20)) % 3 != 1
        mask = Mask(causal=True, predicate=lambda b, h, q, k: (q - k) % 3 != 1)
    out, _ = star(*inputs, mask, options)
    expected, _ = dense_attention(*inputs, pattern([(0, 20)], 20, 20, options) & given)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


ROWS = [(0, 31), (9, 31), (9, 31), (0, 20), (3, 27), (0, 0), (30, 31)]


@pytest.mark.parametrize("sizes", [*CASES, (None, None, None), (None, 3, 2)])
@pytest.mark.parametrize("general", [False, True])
@pytest.mark.parametrize("window", [None, 11])
def test_padding_on_both_sides(sizes: tuple, general: bool, window: int | None) -> None:
    """`general` forces the predicate form with a mask that changes nothing."""
    inputs = sharp_inputs(len(ROWS), 4, 2, 31, 31, 16, dtype=torch.float64)
    padding = torch.zeros(len(ROWS), 31, dtype=torch.bool)
    for row, (first, end) in enumerate(ROWS):
        padding[row, first:end] = True
    options = StarOptions(*sizes)
    mask = Mask(causal=True, window=(None if window is None else window - 1, None), key_padding=padding)
    if general:
        mask = mask.replace(predicate=lambda b, h, q, k: torch.ones_like(q + k, dtype=torch.bool))
    out, lse = star(*inputs, mask, options)
    assert out.isfinite().all()
    for row, (first, end) in enumerate(ROWS):
        seen = pattern([(first, end)], 31, 31, options, window)
        expected, expected_lse = dense_attention(*(x[row : row + 1] for x in inputs), seen)
        torch.testing.assert_close(out[row, :, first:end], expected[0, :, first:end], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(lse[row, :, first:end], expected_lse[0, :, first:end], rtol=1e-10, atol=1e-10)


def test_left_padding_moves_nothing() -> None:
    query, key, value = sharp_inputs(1, 4, 2, 29, 29, 16, dtype=torch.float64)
    options = StarOptions(6, 4, 3)
    alone = star(query, key, value, Mask(causal=True), options).out
    garbage = sharp_inputs(1, 4, 2, 5, 5, 16, dtype=torch.float64, seed=1)
    padded = [torch.cat([pad, x], 2) for pad, x in zip(garbage, (query, key, value), strict=True)]
    padding = torch.arange(34)[None] >= 5
    out = star(*padded, Mask(causal=True, key_padding=padding), options).out
    torch.testing.assert_close(out[:, :, 5:], alone, rtol=1e-12, atol=1e-12)
    assert not out[:, :, :5].any()


def test_packed_prompts_have_their_own_blocks() -> None:
    inputs = sharp_inputs(2, 4, 2, 30, 30, 16, dtype=torch.float64)
    segments = torch.tensor([[0] * 11 + [1] * 19, [4] * 30])
    padding = torch.ones(2, 30, dtype=torch.bool)
    padding[0, 28:] = False
    options = StarOptions(4, 2, 3)
    mask = Mask(causal=True, query_segments=segments, key_segments=segments, key_padding=padding)
    out, _ = star(*inputs, mask, options)
    for row, prompts in enumerate([[(0, 11), (11, 28)], [(0, 30)]]):
        expected, _ = dense_attention(*(x[row : row + 1] for x in inputs), pattern(prompts, 30, 30, options))
        torch.testing.assert_close(out[row : row + 1], expected, rtol=1e-10, atol=1e-10)


def test_holes_in_the_padding_take_the_general_form() -> None:
    inputs = sharp_inputs(1, 4, 2, 20, 20, 16, dtype=torch.float64)
    padding = torch.ones(1, 20, dtype=torch.bool)
    padding[0, [0, 7, 19]] = False
    options = StarOptions(4, 2, 3)
    out, _ = star(*inputs, Mask(causal=True, key_padding=padding), options)
    seen = pattern([(1, 19)], 20, 20, options) & padding[:, None, None]
    expected, _ = dense_attention(*inputs, seen)
    torch.testing.assert_close(out[:, :, 1:19], expected[:, :, 1:19], rtol=1e-10, atol=1e-10)


def test_a_mask_tensor_is_intersected() -> None:
    inputs = sharp_inputs(2, 4, 2, 20, 20, 16, dtype=torch.float64)
    given = torch.rand(2, 1, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.7
    options = StarOptions(4, 2, 3)
    out, _ = star(*inputs, Mask(causal=True, bias=given), options)
    expected, _ = dense_attention(*inputs, pattern([(0, 20)], 20, 20, options) & given)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", [1, 3])
def test_later_tokens_are_dense(rows: int) -> None:
    """D1 and D2 of the original: a query row sees every key before it once, and all of them."""
    query, key, value = sharp_inputs(1, 4, 2, rows, 25, 16, dtype=torch.float64)
    out, _ = star(query, key, value, Mask(causal=True), StarOptions(4, 2, 1))
    seen = torch.arange(25)[None] <= torch.arange(rows)[:, None] + 25 - rows
    expected, _ = dense_attention(query, key, value, seen)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_static_cache_prefill() -> None:
    """More keys than rows, all behind the prompt, unwritten."""
    query, key, value = sharp_inputs(1, 4, 2, 21, 40, 16, dtype=torch.float64)
    key[:, :, 21:], value[:, :, 21:] = torch.nan, torch.nan
    options = StarOptions(4, 2, 3)
    inputs = (query, key[:, :, :21], value[:, :, :21])
    expected, _ = dense_attention(*inputs, pattern([(0, 21)], 21, 21, options))
    for offset in (0, torch.tensor(0)):
        out, _ = star(query, key, value, Mask(causal=True, offset=offset), options)
        torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)


def test_a_bidirectional_prefix_is_refused() -> None:
    inputs = sharp_inputs(1, 4, 2, 9, 9, 16)
    with pytest.raises(NotImplementedError, match="tiled_attention"):
        star(*inputs, Mask(causal=True, prefix=3), StarOptions(4, 2, 3))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_backward(padded: bool, softcap: float | None) -> None:
    inputs = [x.requires_grad_() for x in sharp_inputs(2, 4, 2, 26, 26, 16, dtype=torch.float64)]
    options = StarOptions(6, 4, 5)
    spans = [(0, 26), (4, 26)] if padded else [(0, 26)] * 2
    padding = torch.stack([(torch.arange(26) >= first) & (torch.arange(26) < end) for first, end in spans])
    mask = Mask(causal=True, key_padding=padding if padded else None)
    weight = torch.randn(2, 4, 26, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen = torch.cat([pattern([span], 26, 26, options) for span in spans])
    got = torch.autograd.grad((star(*inputs, mask, options, softcap).out * weight).sum(), inputs)
    expected = torch.autograd.grad((dense_attention(*inputs, seen, softcap=softcap)[0] * weight).sum(), inputs)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_work_is_proportional_to_the_attended_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_attn_plugins.kernels import bound_attend as module

    pairs = []

    def counting(query: Tensor, key: Tensor, value: Tensor, *, mask: Mask, **_: object) -> Partial:
        rows, keys = query.shape[2], key.shape[2]
        start = keys - rows
        causal = rows * (start + 1) + rows * (rows - 1) // 2
        pairs.append(query.shape[0] * (causal if mask.causal else rows * keys))
        return Partial.empty(query, value.shape[-1])

    monkeypatch.setattr(module, "attend", counting)
    inputs = sharp_inputs(1, 1, 1, 1000, 1000, 4)
    star(*inputs, Mask(causal=True), StarOptions(64, 16, 100))
    assert len(pairs) == 4  # whole blocks, the ragged one, the anchor, the query: not one call a block
    assert sum(pairs) == plan_for(1000, 64, 16, 100).attended_pairs()
    pairs.clear()
    star(*inputs, Mask(causal=True), StarOptions(64, 16, 100, 150))
    assert len(pairs) == 5  # the blocks that see everything, whole blocks, the ragged one, the anchor, the query
    assert sum(pairs) == plan_for(1000, 64, 16, 100, 150).attended_pairs()


def test_only_the_anchor_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block and the query read keys in place; later blocks need them behind the anchor's."""
    from hf_attn_plugins.kernels import bound_attend as module

    seen = []

    def watching(query: Tensor, key: Tensor, value: Tensor, *, mask: Mask, **_: object) -> Partial:
        seen.append((key.untyped_storage().data_ptr(), key.shape[0] * key.shape[2]))
        return Partial.empty(query, value.shape[-1])

    monkeypatch.setattr(module, "attend", watching)
    query, key, value = sharp_inputs(1, 2, 1, 106, 106, 4)
    for anchor, copied in ((8, [5 * (8 + 16)]), (0, [])):
        seen.clear()
        star(query, key, value, Mask(causal=True), StarOptions(16, anchor, 10))
        assert [size for place, size in seen if place != key.untyped_storage().data_ptr()] == copied


def test_keys_of_a_halo_are_views(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_attn_plugins.kernels import bound_attend as module

    places = set()

    def watching(query: Tensor, key: Tensor, value: Tensor, *, mask: Mask, **_: object) -> Partial:
        places.add(key.untyped_storage().data_ptr())
        return Partial.empty(query, value.shape[-1])

    monkeypatch.setattr(module, "attend", watching)
    query, key, value = sharp_inputs(1, 2, 1, 206, 206, 4)
    star(query, key, value, Mask(causal=True), StarOptions(16, 8, 10, 50))
    assert places == {key.untyped_storage().data_ptr()}


@pytest.mark.parametrize(
    "sizes",
    [
        (None, None, None),
        (None, 300, 7),
        (512, None, None),
        (None, 5000, 0),
        (128, 64, 7, 500),
        (None, None, 9, 300),
        (None, None, None, None, "paper"),
        (None, 5000, 7, None, "paper"),
    ],
)
def test_sizes_in_tensors_are_those_of_the_planner(sizes: tuple) -> None:
    options = StarOptions(*sizes[:4], preset=sizes[4] if len(sizes) > 4 else None)
    lengths = [0, 1, 2, 100, DENSE_BELOW - 1, DENSE_BELOW, DENSE_BELOW + 1, 4096, 6000]
    rows = max(lengths)
    padding = torch.arange(rows)[None] >= rows - torch.tensor(lengths)[:, None]
    got = row_sizes(Mask(key_padding=padding), rows, options)
    for index, length in enumerate(lengths):
        plan = plan_for(length, *sizes)
        assert (got.block[index], got.anchor[index], got.context[index], got.halo.expand(len(lengths))[index]) == (
            plan.block_size,
            plan.anchor_size,
            plan.context,
            plan.halo_size,
        )
        assert got.first[index] == rows - length or length == 0


def test_compiles_without_a_break() -> None:
    inputs = sharp_inputs(2, 4, 2, 23, 23, 16)
    options = StarOptions(6, 4, 5)

    def both(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> Tensor:
        return star(query, key, value, Mask(causal=True, key_padding=padding), options).out

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs, None), both(*inputs, None), rtol=1e-5, atol=1e-5)
