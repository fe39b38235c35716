"""Which kernel a call goes to, and the short way for short calls."""

import importlib

import pytest
import torch

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.kernels.aten.attend import run_one_operator
from hf_attn_plugins.kernels.cpu_fused import instruction_sets
from hf_attn_plugins.kernels.cpu_fused.instruction_sets import VARIABLE
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention, sharp_inputs, visibility

choosing = importlib.import_module("hf_attn_plugins.kernels.choose")


@pytest.mark.parametrize(
    ("heads", "rows", "keys", "causal", "expected"),
    [
        ((8, 8), 1, 8192, True, "aten"),
        ((8, 8), 64, 8192, True, "aten"),
        ((8, 8), 128, 8192, True, "cpu_tiled"),
        ((9, 3), 43, 8192, True, "cpu_tiled"),  # three heads share keys: 129 rows of one product
        ((8, 8), 512, 512, True, "aten"),
        ((8, 8), 512, 512, False, "cpu_tiled"),
        ((8, 8), 1024, 1024, True, "cpu_tiled"),
    ],
)
def test_without_a_compiler_the_choice_follows_rows_times_shared_heads(
    monkeypatch, heads, rows, keys, causal, expected
):
    monkeypatch.setattr(choosing, "fused_from", lambda *_: None)
    monkeypatch.setattr(choosing, "tiles_pay", lambda: True)
    query = torch.empty(1, heads[0], rows, 64, dtype=torch.bfloat16)
    key = torch.empty(1, heads[1], keys, 64, dtype=torch.bfloat16)
    assert choosing.choose(query, key, key, Mask(causal=causal), None, 0.0).name == expected
    monkeypatch.setattr(choosing, "tiles_pay", lambda: False)
    assert choosing.choose(query, key, key, Mask(causal=causal), None, 0.0).name == "aten"


@pytest.mark.parametrize(
    ("rows", "keys", "change", "expected"),
    [
        (1, 255, {}, "aten"),
        (1, 256, {}, "cpu_fused"),
        (32, 96, {}, "cpu_fused"),
        (64, 95, {}, "aten"),
        (64, 191, dict(mask=Mask()), "aten"),
        (64, 192, dict(mask=Mask()), "cpu_fused"),
        (64, 96, dict(mask=Mask(window=(9, 9))), "cpu_fused"),
        (256, 256, dict(softcap=5.0), "cpu_fused"),
        (1, 8, dict(softcap=5.0), "cpu_fused"),
        (256, 256, dict(dropout=0.1), "cpu_fused"),
        (256, 256, dict(softcap=5.0, mask=Mask(predicate=lambda b, h, q, k: k <= q)), "cpu_tiled"),
        (256, 256, dict(mask=Mask(causal=True, key_padding=torch.ones(1, 256, dtype=torch.bool))), "cpu_fused"),
        (256, 256, dict(mask=Mask(bias=torch.ones(256, 256, dtype=torch.bool))), "cpu_fused"),
        (64, 64, dict(mask=Mask(bias=torch.ones(64, 64, dtype=torch.bool))), "aten"),
        (64, 64, dict(mask=Mask(causal=True, bias=torch.ones(64, 64))), "cpu_fused"),
        (64, 64, dict(mask=Mask(bias=torch.ones(64, 64, requires_grad=True))), "cpu_fused"),
        (64, 64, dict(mask=Mask(bias=torch.ones(1, 64, requires_grad=True))), "cpu_tiled"),
        (256, 256, dict(dtype=torch.float32), "aten"),
    ],
)
def test_with_a_compiler_bfloat16_calls_of_some_length_are_fused(monkeypatch, rows, keys, change, expected):
    sizes = {torch.bfloat16: choosing.FusedFrom(96, 192, 256)}
    monkeypatch.setattr(choosing, "fused_from", lambda dtype, altered: sizes.get(dtype))
    monkeypatch.setattr(choosing, "cpu_multiplies_bf16", lambda: True)
    monkeypatch.setattr("hf_attn_plugins.kernels.cpu_fused.call.unavailable", lambda dtype: None)
    dtype = change.get("dtype", torch.bfloat16)
    query, key = torch.empty(1, 8, rows, 64, dtype=dtype), torch.empty(1, 8, keys, 64, dtype=dtype)
    mask, softcap = change.get("mask", Mask(causal=rows > 1)), change.get("softcap")
    assert choosing.choose(query, key, key, mask, softcap, change.get("dropout", 0.0)).name == expected
    monkeypatch.setattr(choosing, "fused_from", lambda *_: None)
    assert choosing.choose(query, key, key, mask, softcap, change.get("dropout", 0.0)).name != "cpu_fused"


def test_few_rows_are_fused_where_pytorch_is_slower_or_cannot(monkeypatch):
    sizes = choosing.FusedFrom(96, 192, 2**62)  # as with AMX, where PyTorch decodes faster
    monkeypatch.setattr(choosing, "fused_from", lambda dtype, altered: sizes)
    monkeypatch.setattr("hf_attn_plugins.kernels.cpu_fused.call.unavailable", lambda dtype: None)
    query, key = (torch.empty(1, 8, length, 64, dtype=torch.bfloat16) for length in (1, 2048))
    for mask, softcap, expected in ((Mask(), None, "aten"), (Mask(causal=True), None, "aten"),
                                    (Mask(causal=True, window=(99, None)), None, "cpu_fused"),
                                    (Mask(), 30.0, "cpu_fused")):  # fmt: skip
        assert choosing.choose(query, key, key, mask, softcap, 0.0).name == expected


def test_beside_amx_of_pytorch_only_amx_of_ours_is_chosen(monkeypatch):
    sets = {one.name: one for one in instruction_sets.SETS}
    monkeypatch.setattr(choosing, "cpu_has_kept", lambda feature: True)
    monkeypatch.setattr(choosing.build, "reason_against", lambda chosen: None)
    for name, plain in (("amx", choosing.FUSED_FROM["amx", torch.bfloat16]), ("avx512_bf16", None)):
        monkeypatch.setattr(choosing, "best", lambda dtype, most, name=name: sets[name])
        assert choosing.fused_from(torch.bfloat16) == plain
        assert choosing.fused_from(torch.bfloat16, True) == choosing.MASKED_FROM[name, torch.bfloat16]
    assert choosing.cpu_multiplies_bf16() and not choosing.tiles_pay()


MASKS = {
    "causal": (dict(causal=True), 24, 24),
    "full": ({}, 7, 24),
    "one row": (dict(causal=True, offset=23), 1, 24),
    "one row, not the last": (dict(causal=True, offset=11), 1, 24),
    "a chunk": (dict(causal=True), 7, 24),
    "more rows than keys": (dict(causal=True), 24, 7),
    "window": (dict(causal=True, window=(3, None)), 24, 24),
    "padding": (dict(causal=True, key_padding=torch.arange(24)[None] > 4), 24, 24),
    "prefix": (dict(causal=True, prefix=6), 24, 24),
}


@pytest.mark.parametrize("fields, rows, keys", MASKS.values(), ids=MASKS)
def test_short_calls_see_the_same_keys(fields, rows, keys):
    query, key, value = sharp_inputs(1, 4, 2, rows, keys, 16)
    plain = {"is_causal" if name == "causal" else name: value for name, value in fields.items()}
    visible = visibility(rows, keys, **plain)
    out, lse = dense_attention(query.double(), key.double(), value.double(), visible)
    low_out, low_lse = dense_attention(query, key, value, visible)
    part = attend(query, key, value, mask=Mask(**fields))
    assert_close_to_reference(part.out, low_out, out)
    seen = lse > -torch.inf
    assert torch.equal(part.lse > -torch.inf, seen)
    assert_close_to_reference(part.lse[seen], low_lse[seen], lse[seen], name="lse")


def test_the_short_way_leaves_everything_else_alone():
    def is_short(query, key, value, mask):
        return choosing.choose(query, key, value, mask, None, 0.0).run is run_one_operator

    query, key, value = sharp_inputs(1, 4, 2, 24, 24, 16)
    assert is_short(query, key, value, Mask(causal=True))
    for name in ("one row, not the last", "window", "padding", "prefix", "more rows than keys", "a chunk"):
        fields, rows, keys = MASKS[name]
        inputs = query[:, :, :rows], key[:, :, :keys], value[:, :, :keys]
        assert not is_short(*inputs, Mask(**fields)), name
    assert not is_short(query.requires_grad_(), key, value, Mask(causal=True))


def test_the_choice_is_made_once_per_call(monkeypatch):
    asked = []
    fused_from = choosing.fused_from
    monkeypatch.setattr(choosing, "fused_from", lambda *args: asked.append(1) or fused_from(*args))
    query = torch.randn(1, 2, 300, 32).bfloat16()
    attend(query, query, query, is_causal=True)
    assert len(asked) == 1


def test_the_environment_is_read_once(monkeypatch):
    query = torch.randn(1, 2, 300, 32)
    attend(query, query, query)
    monkeypatch.setenv(VARIABLE, "no such set")
    attend(query, query, query)  # refuses this value, if it is read


@pytest.mark.parametrize("kernel", ["reference", "aten", "cpu_tiled", "cpu_fused", "triton", "flex"])
def test_a_named_kernel_is_forced(kernel):
    query = torch.empty(1, 2, 1, 16)
    choice = choosing.choose(query, query, query, Mask(), None, 0.0, kernel)
    assert choice.name == kernel and choice.run.__name__ == kernel


def test_an_unknown_kernel_is_refused():
    query = torch.empty(1, 2, 1, 16)
    with pytest.raises(ValueError, match="'fast' is unknown: choose one of reference"):
        choosing.choose(query, query, query, Mask(), None, 0.0, "fast")


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("group", [1, 3, 4])
def test_few_heads_that_share_keys_become_rows_only_where_that_is_faster(monkeypatch, amx, group):
    from hf_attn_plugins.kernels.aten import attend as aten

    shapes = []
    run = aten.flash_cpu
    monkeypatch.setattr(aten, "_multiplies_by_amx", lambda: amx)
    monkeypatch.setattr(aten, "flash_cpu", lambda query, *rest: shapes.append(tuple(query.shape)) or run(query, *rest))
    query, key, value = sharp_inputs(1, 2 * group, 2, 1, 40, 16, dtype=torch.bfloat16)
    out, lse = attend(query, key, value, kernel="aten")
    folded = group > 1 and (group >= 4 or not amx)
    assert shapes == [(1, 2, group, 16) if folded else (1, 2 * group, 1, 16)]
    visible = visibility(1, 40)
    ref, ref_lse = dense_attention(query.double(), key.double(), value.double(), visible)
    low, low_lse = dense_attention(query, key, value, visible)
    assert_close_to_reference(out, low, ref)
    assert_close_to_reference(lse, low_lse, ref_lse, 3.0, "lse")


FEW = {  # (rows of a key head, keys, padded): whether the compiled kernel is chosen, by the sizes below
    "a row of a head of its own": ((1, 8192, False), False),
    "three heads share, too few keys": ((3, 300, False), False),
    "three heads share": ((3, 700, False), True),
    "padded, three heads share": ((3, 300, True), True),
    "padded, a head of its own": ((1, 300, True), True),
    "padded, fewer keys than ever": ((3, 200, True), False),
    "more rows than win where all see all keys": ((9, 8192, False), False),
    "as many, padded": ((9, 8192, True), True),
    "more rows than ever win": ((24, 8192, True), False),
}


@pytest.mark.parametrize("case, chosen", FEW.values(), ids=FEW)
def test_a_few_rows_by_what_they_share(case, chosen):
    rows, keys, padded = case
    sizes = choosing.FusedFrom(256, 256, 256, least=2, most=16, most_full=8, scores=2048)
    query, key = torch.empty(1, rows, 1, 64), torch.empty(1, 1, keys, 64)
    mask = Mask(key_padding=torch.ones(1, keys, dtype=torch.bool)) if padded else Mask()
    assert sizes.few_win(query, key, mask) == chosen
