"""The exported functions against the definition: alignment, windows, sinks, packing, and what they refuse."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from hf_attn_plugins.kernels import attend, hub_masks
from hf_attn_plugins.kernels import hub_entry as hub
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention

CAUSAL = SimpleNamespace(is_causal=True)


def made(rows, keys, batch=1):
    return torch.randn(batch, 4, rows, 8) * 3, torch.randn(batch, 2, keys, 8) * 3, torch.randn(batch, 2, keys, 8)


def check(out, q, k, v, visible, sinks=None, **numbers):
    """`out` (B, T, Hq, D) against the definition in float64."""

    def plain(q, k, v):
        found, lse = dense_attention(q, k, v, visible, **numbers)
        return found if sinks is None else found * torch.sigmoid(lse - sinks.to(lse).view(1, -1, 1)).unsqueeze(-1)

    ref, low = plain(q.double(), k.double(), v.double()), plain(q, k, v)
    assert_close_to_reference(out.transpose(1, 2), low, ref)


def causal(rows, keys, offset, window=None):
    i, j = torch.arange(rows)[:, None] + offset, torch.arange(keys)
    return (j <= i) & (j > i - (window or keys + rows))


def test_no_mask_is_causal_from_the_top_left_or_full_for_one_row():
    q, k, v = made(5, 9)
    check(hub.flash_attn_forward(CAUSAL, q, k, v)[0], q, k, v, causal(5, 9, 0))
    check(hub.flash_attn_forward(CAUSAL, q, k, v, is_causal=False)[0], q, k, v, torch.ones(5, 9, dtype=torch.bool))
    check(hub.flash_attn_forward(CAUSAL, q[:, :, :1], k, v)[0], q[:, :, :1], k, v, torch.ones(1, 9, dtype=torch.bool))


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_biases_and_sinks(kind):
    q, k, v = made(6, 6, batch=2)
    visible = (torch.rand(2, 1, 6, 6) < 0.6) | torch.eye(6, dtype=torch.bool)
    visible[1, :, :2] = False  # rows of padding
    mask = visible if kind == "bool" else torch.where(visible, 0.0, -torch.inf)
    sinks = torch.tensor([0.0, 2.0, 4.0, -50.0])
    out, weights = hub.flash_attn_forward(CAUSAL, q, k, v, mask, s_aux=sinks, softcap=5.0, scaling=0.5)
    assert weights is None and not out[1, :2].any()
    check(out, q, k, v, visible, sinks, softcap=5.0, scale=0.5)
    bias = torch.randn(1, 4, 6, 6)
    check(hub.flash_attn_forward(CAUSAL, q, k, v, mask, position_bias=bias)[0], q, k, v, visible, bias=bias)


def test_packed_lengths_say_everything_in_continuous_batching():
    q, k, v = made(6, 12)
    begins_q, begins_k = torch.tensor([0, 3, 4, 6]), torch.tensor([0, 3, 8, 12])
    visible = torch.zeros(6, 12, dtype=torch.bool)
    for (t, t_end), (s, s_end) in zip([(0, 3), (3, 4), (4, 6)], [(0, 3), (3, 8), (8, 12)], strict=True):
        visible[t:t_end, s:s_end] = causal(t_end - t, s_end - s, (s_end - s) - (t_end - t), window=4)
    given = {"cu_seq_lens_q": begins_q, "cu_seq_lens_k": begins_k, "sliding_window": 4}
    check(hub.flash_attn_forward(CAUSAL, q, k, v, **given)[0], q, k, v, visible)
    wrong = torch.zeros(1, 1, 6, 6, dtype=torch.bool)  # Transformers makes one of T x T there
    check(hub.flash_attn_forward(CAUSAL, q, k, v, wrong, read_index=[], **given)[0], q, k, v, visible)
    flat = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
    out = hub.flash_attn_varlen_func(*flat, begins_q, begins_k, 3, 5, causal=True, window_size=(3, 3))
    check(out.unsqueeze(0), q, k, v, visible)


def test_flash_attn_func_is_aligned_to_the_bottom_right():
    q, k, v = made(4, 7, batch=2)
    given = [x.transpose(1, 2) for x in (q, k, v)]
    sinks = torch.randn(4)
    check(hub.flash_attn_func(*given, causal=True, s_aux=sinks), q, k, v, causal(4, 7, 3), sinks)
    i, j = torch.arange(4)[:, None] + 3, torch.arange(7)
    check(hub.flash_attn_func(*given, window_size=(1, 2)), q, k, v, (j >= i - 1) & (j <= i + 2))
    check(hub.flash_attn_func(*given, causal=True, softcap=4.0), q, k, v, causal(4, 7, 3), softcap=4.0)


@pytest.mark.parametrize("name", ["indices", "block_indices", "block_table"])
def test_what_would_change_the_result_is_refused(name):
    with pytest.raises(NotImplementedError, match=name):
        hub.flash_attn_forward(CAUSAL, *made(3, 3), **{name: torch.zeros(1)})


def test_autocast_brings_one_dtype():
    q, k, v = made(3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert hub.flash_attn_forward(CAUSAL, q, k, v.bfloat16())[0].dtype == torch.bfloat16


def order(rows, keys, window=None):
    return causal(rows, keys, keys - rows, window)


PADDING = torch.tensor([[True] * 9, [False] * 3 + [True] * 6, [True] * 7 + [False] * 2])


@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("kind", [torch.bool, torch.int64])
def test_padding_by_key(rows, window, kind):
    q, k, v = made(rows, 9, batch=3)
    visible = order(rows, 9, window) & PADDING[:, None, None]
    given = PADDING.to(kind)
    check(hub.flash_attn_forward(CAUSAL, q, k, v, given, sliding_window=window)[0], q, k, v, visible)
    room = [torch.cat([x, torch.full_like(x, torch.nan)], 2) for x in (k, v)]  # a static cache, filled to its half
    check(hub.flash_attn_forward(CAUSAL, q, *room, given, sliding_window=window)[0], q, k, v, visible)
    bias = torch.randn(3, 4, rows, 9)
    out, _ = hub.flash_attn_forward(CAUSAL, q, k, v, given, sliding_window=window, position_bias=bias)
    check(out, q, k, v, visible, bias=bias)
    i, j = torch.arange(rows)[:, None] + 9 - rows, torch.arange(9)
    near = (abs(i - j) < window) if window else torch.ones(rows, 9, dtype=torch.bool)
    out, _ = hub.flash_attn_forward(CAUSAL, q, k, v, given, sliding_window=window, is_causal=False)
    check(out, q, k, v, near & PADDING[:, None, None])


def test_padding_by_key_is_not_read_as_something_else():
    q, k, v = made(9, 9, batch=3)
    with pytest.raises(ValueError, match=r"pass \.bool\(\)"):
        hub.flash_attn_forward(CAUSAL, q, k, v, torch.zeros(3, 9))
    with pytest.raises(ValueError, match=r"\(batch, keys\) = \(3, 9\)"):
        hub.flash_attn_forward(CAUSAL, q, k, v, torch.ones(3, 10, dtype=torch.bool))


@pytest.fixture
def masks(monkeypatch):
    """The masks with which `attend` was called."""
    seen = []

    def watched(*args, mask, **rest):
        seen.append(mask)
        return attend(*args, mask=mask, **rest)

    monkeypatch.setattr(hub, "attend", watched)
    return seen


@pytest.mark.parametrize("rows", [1, 4, 9])
@pytest.mark.parametrize("window", [None, 3])
def test_padding_and_order_are_recognised_in_a_mask_tensor(rows, window, masks):
    q, k, v = made(rows, 9, batch=3)
    mask = order(rows, 9, window) & PADDING[:, None, None]
    for _ in range(2):  # the second layer gets the same tensor
        check(hub.flash_attn_forward(CAUSAL, q, k, v, mask, sliding_window=window)[0], q, k, v, mask)
    assert len(masks) == 2 and all(m.bias is None and m.key_padding is not None for m in masks)
    assert rows == 1 or masks[0].key_padding is masks[1].key_padding, "one reading for all layers"


def test_padding_is_recognised_where_all_rows_are_alike(masks):
    q, k, v = made(5, 9, batch=3)
    mask = PADDING[:, None, None].expand(3, 1, 5, 9)  # as Transformers makes it for encoders
    check(hub.flash_attn_forward(CAUSAL, q, k, v, mask, is_causal=False)[0], q, k, v, mask)
    assert masks[0].bias is None


@pytest.mark.parametrize("place", [(0, 0, 8, 0), (1, 0, 0, 8), (2, 0, 4, 4)])
def test_a_mask_that_says_something_else_stays_a_tensor(place, masks):
    q, k, v = made(9, 9, batch=3)
    mask = (order(9, 9) & PADDING[:, None, None]).contiguous()
    check(hub.flash_attn_forward(CAUSAL, q, k, v, mask)[0], q, k, v, mask)
    mask[place] ^= True  # the same tensor, changed since it was read
    check(hub.flash_attn_forward(CAUSAL, q, k, v, mask)[0], q, k, v, mask)
    assert masks[0].bias is None and masks[1].bias is mask
    with torch.inference_mode():  # such tensors do not count their changes
        other = (order(9, 9) & PADDING[:, None, None]).clone()
        check(hub.flash_attn_forward(CAUSAL, q, k, v, other)[0], q, k, v, other)
        other[place] ^= True
        check(hub.flash_attn_forward(CAUSAL, q, k, v, other)[0], q, k, v, other)
    assert masks[2].bias is None and masks[3].bias is other


def test_rows_are_read_in_parts(monkeypatch):
    monkeypatch.setattr(hub_masks, "ROWS", 4)
    mask = order(9, 9) & PADDING[:, None, None]
    assert torch.equal(hub_masks.padding_under_order(mask, None), PADDING)
    mask[1, 0, 8, 7] = False  # row 7 sees that key
    assert hub_masks.padding_under_order(mask, None) is None
