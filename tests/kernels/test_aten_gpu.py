"""PyTorch's operators for GPUs, without one: doubles on the CPU keep the operators' contracts and schemas."""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.kernels.aten import gpu
from hf_attn_plugins.star.entry import attention
from hf_attn_plugins.star.options import StarOptions
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention, sharp_inputs, visibility

aten = importlib.import_module("hf_attn_plugins.kernels.aten.attend")
PREFIX = "_scaled_dot_product_"


@pytest.mark.parametrize(
    ("arch", "dtype", "width", "gradient", "bias", "expected"),
    [
        ("sm90", torch.bfloat16, 128, False, False, ("flash", "efficient", "cudnn")),
        ("sm90", torch.bfloat16, 128, True, False, ("flash", "efficient")),
        ("sm90", torch.bfloat16, 256, False, False, ("flash", "efficient")),
        ("sm90", torch.bfloat16, 256, True, False, ("efficient",)),  # no room for the columns of the lse's gradient
        ("sm90", torch.bfloat16, 248, True, False, ("flash", "efficient")),
        ("sm86", torch.bfloat16, 248, True, False, ("efficient",)),
        ("sm120", torch.float16, 128, True, False, ("flash", "efficient")),
        ("sm90", torch.bfloat16, 576, False, False, ("efficient",)),
        ("sm90", torch.bfloat16, 64, False, True, ("efficient",)),
        ("sm90", torch.float32, 64, False, False, ("efficient",)),
        ("sm90", torch.float64, 64, False, False, ()),
        ("sm75", torch.float16, 64, False, False, ("efficient",)),
        ("sm75", torch.bfloat16, 64, False, False, ()),
        ("gfx942", torch.bfloat16, 128, False, False, ("flash", "efficient")),
        ("gfx1100", torch.bfloat16, 128, False, False, ()),
    ],
)
def test_which_operators_take_a_call(arch, dtype, width, gradient, bias, expected):
    assert gpu.operators_for(arch, dtype, width, gradient, bias) == expected


def bound(name, given, keywords):
    """The arguments by the names of the operator's schema; TypeError for one that it does not have."""
    schema = getattr(torch.ops.aten, PREFIX + name).default._schema.arguments
    named = dict(zip((argument.name for argument in schema), given, strict=False)) | keywords
    unknown = set(named) - {argument.name for argument in schema}
    missing = {a.name for a in schema if not a.has_default_value()} - set(named)
    if unknown or missing or len(given) > len(schema):
        raise TypeError(f"{name}: unknown {unknown}, missing {missing}")
    for argument in schema:
        if isinstance(named.get(argument.name), torch.Tensor):
            assert "Tensor" in str(argument.type), argument.name
    return named


def scores_of(a):
    rows, keys = a["query"].shape[2], a["key"].shape[2]
    scores = a["query"].double() @ a["key"].double().repeat_interleave(a["query"].shape[1] // a["key"].shape[1], 1).mT
    scores = scores * (a["query"].shape[-1] ** -0.5 if a.get("scale") is None else a["scale"])
    if a.get("attn_bias") is not None:
        scores = scores + a["attn_bias"].double()
    if a.get("is_causal"):
        assert rows == keys, "causal calls are square"
        scores = scores.masked_fill(torch.ones(rows, keys, dtype=torch.bool).triu(1), -torch.inf)
    return scores


class Doubles:
    """The operators' contracts: alignment, heads, biases, padded lse, NaN for rows without keys."""

    def __init__(self):
        self.called = []

    def __call__(self, name):
        name = name.removeprefix(PREFIX)
        return lambda *given, **keywords: getattr(self, name.removesuffix("_attention").replace("attention_", ""))(
            bound(name, given, keywords)
        )

    def forward(self, a, name):
        self.called.append(name)
        query, key, value = a["query"], a["key"], a["value"]
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]
        unit = 4 if query.dtype == torch.float32 else 8
        for x in (query, key, value):
            assert x.stride(-1) == 1 and x.shape[-1] % unit == 0 and x.numel()
            assert all(n * x.element_size() % 16 == 0 for n in (*x.stride()[:-1], x.storage_offset()))
        scores = scores_of(a)
        groups = query.shape[1] // key.shape[1]
        out = scores.softmax(-1) @ value.double().repeat_interleave(groups, 1)  # NaN where a row sees no key
        return out.to(query.dtype), scores.logsumexp(-1).float()

    def flash(self, a):
        out, lse = self.forward(a, "flash")
        return (out, lse, None, None, out.shape[2], a["key"].shape[2], torch.zeros(2), torch.zeros(()), torch.empty(0))

    def cudnn(self, a):
        assert a["attn_bias"] is None and a["compute_log_sumexp"] is True
        out, lse = self.forward(a, "cudnn")
        return (out, lse.unsqueeze(-1), None, None, 1, 1, torch.zeros(()), torch.zeros(()), None)

    def efficient(self, a):
        assert a["compute_log_sumexp"] is True and a["query"].shape[1] == a["key"].shape[1]
        bias = a["attn_bias"]
        if bias is not None:
            assert bias.shape == (*a["query"].shape[:3], a["key"].shape[2]) and bias.dtype == a["query"].dtype
            assert bias.stride(-1) == 1 and all(n % 8 == 0 for n in bias.stride()[:-1])
        out, lse = self.forward(a, "efficient")
        padded = lse.new_full((*lse.shape[:2], math.ceil(lse.shape[2] / 32) * 32), torch.nan)
        padded[..., : lse.shape[2]] = lse
        return out, padded, torch.zeros(()), torch.zeros(())

    def flash_backward(self, a):
        assert a["query"].shape[-1] <= 256 and a["max_q"] == a["query"].shape[2]
        return self.backward(a | {"grad_out_": a["grad_out"]})

    def efficient_backward(self, a):
        assert a["logsumexp"].shape[2] % 32 == 0 and a["query"].shape[1] == a["key"].shape[1]
        return (*self.backward(a), None)

    def backward(self, a):
        self.called.append("backward")
        rows, groups = a["query"].shape[2], a["query"].shape[1] // a["key"].shape[1]
        scale = a["scale"]
        query, grad, out = a["query"].double(), a["grad_out_"].double(), a["out"].double()
        key, value = (a[x].double().repeat_interleave(groups, 1) for x in ("key", "value"))
        weights = (scores_of(a) - a["logsumexp"][..., :rows].double().unsqueeze(-1)).exp()
        d_scores = weights * (grad @ value.mT - (grad * out).sum(-1, keepdim=True))
        d_key, d_value = d_scores.mT @ query * scale, weights.mT @ grad
        found = [d_scores @ key * scale, *(x.unflatten(1, (-1, groups)).sum(2) for x in (d_key, d_value))]
        return [x.to(a["query"].dtype) for x in found]


@pytest.fixture
def doubles(monkeypatch):
    found = Doubles()
    monkeypatch.setattr(gpu, "fused_operator", found)
    monkeypatch.setattr(aten, "on_gpu", lambda tensor: True)
    monkeypatch.setattr(aten, "reason_against", lambda *call: None)
    return found


def padding(*lengths, side="left", keys=40):
    index = torch.arange(keys)
    return torch.stack([index >= keys - n if side == "left" else index < n for n in lengths])


CALLS = {
    "full": ({}, 24, 40),
    "causal": (dict(is_causal=True), 40, 40),
    "later rows": (dict(is_causal=True), 24, 40),
    "rows before the first key": (dict(is_causal=True, offset=-5), 24, 40),
    "rows behind the last key": (dict(is_causal=True, offset=30), 24, 40),
    "only rows behind the last key": (dict(is_causal=True, offset=45), 24, 40),
    "more rows than keys": (dict(is_causal=True), 40, 24),
    "one row": (dict(is_causal=True), 1, 40),
    "left padding": (dict(is_causal=True, key_padding=padding(40, 13)), 40, 40),
    "right padding": (dict(is_causal=True, key_padding=padding(40, 13, side="right")), 40, 40),
    "decode with padding": (dict(is_causal=True, key_padding=padding(40, 13)), 1, 40),
    "decode, a prompt without keys": (dict(is_causal=True, key_padding=padding(40, 0)), 3, 40),
    "holes": (dict(key_padding=torch.arange(80).view(2, 40) % 3 > 0), 20, 40),
}


@pytest.mark.parametrize("operator", ["flash", "efficient", "cudnn"])
@pytest.mark.parametrize("name", CALLS)
def test_calls_become_what_the_operators_take(doubles, monkeypatch, name, operator):
    fields, rows, keys = CALLS[name]
    monkeypatch.setattr(gpu, "operator_for", lambda q, k, v, bias: "efficient" if bias else operator)
    inputs = sharp_inputs(2, 4, 2, rows, keys, 20, 12)
    plain = {"causal" if key == "is_causal" else key: value for key, value in fields.items()}
    visible = visibility(rows, keys, **fields)
    part = attend(*inputs, mask=Mask(**plain), kernel="aten")
    ref = dense_attention(*(x.double() for x in inputs), visible)
    low = dense_attention(*inputs, visible)
    seen = ref[1] > -torch.inf
    assert doubles.called and torch.equal(part.lse > -torch.inf, seen)
    assert_close_to_reference(part.out, low[0], ref[0])
    assert_close_to_reference(part.lse[seen], low[1][seen], ref[1][seen], name="lse")


@pytest.mark.parametrize("operator", ["flash", "efficient"])
@pytest.mark.parametrize("name", CALLS)
def test_gradients_through_out_and_lse(doubles, monkeypatch, name, operator):
    fields, rows, keys = CALLS[name]
    monkeypatch.setattr(gpu, "operator_for", lambda q, k, v, bias: "efficient" if bias else operator)
    inputs = sharp_inputs(2, 4, 2, rows, keys, 20, 12)
    plain = {"causal" if key == "is_causal" else key: value for key, value in fields.items()}
    visible, found = visibility(rows, keys, **fields), []
    weight = torch.randn(2, 4, rows, 12)
    for kind in (torch.float64, None):
        leaves = [x.detach().to(kind or x.dtype).requires_grad_() for x in inputs]
        out, lse = (
            attend(*leaves, mask=Mask(**plain), kernel="aten") if kind is None else dense_attention(*leaves, visible)
        )
        loss = (out * weight).sum() + torch.where(lse > -torch.inf, lse, 0).sum()
        found.append(torch.autograd.grad(loss, leaves))
    assert "backward" in doubles.called
    for ref, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, ref.float(), atol=1e-4, rtol=1e-4)


def test_a_static_caches_offset_is_read_on_the_device(doubles):
    """Few rows under an offset held in a tensor: one call, heads that share keys folded, no number read."""
    query, key, value = sharp_inputs(2, 4, 2, 3, 64, 16)
    mask = Mask(causal=True, offset=torch.tensor(20))
    part = aten.aten(query, key, value, mask, 0.25, None, 0.0)
    out, lse = dense_attention(query, key, value, visibility(3, 64, is_causal=True, offset=20), scale=0.25)
    torch.testing.assert_close(part.out, out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part.lse, lse, atol=1e-5, rtol=1e-5)
    assert doubles.called == ["efficient"]


def test_heads_that_share_keys_are_read_once_where_the_operator_can(doubles, monkeypatch):
    monkeypatch.setattr(gpu, "operator_for", lambda *call: "flash")
    shapes = []
    monkeypatch.setattr(doubles, "flash", lambda a, plain=doubles.flash: shapes.append(a["key"].shape[1]) or plain(a))
    attend(*sharp_inputs(1, 6, 2, 40, 40, 16), is_causal=True, kernel="aten")
    monkeypatch.setattr(torch.version, "hip", "6.4")
    attend(*sharp_inputs(1, 6, 2, 40, 40, 16), is_causal=True, kernel="aten")
    assert shapes == [2, 6]


@pytest.mark.parametrize("length", [96, 200])
def test_stars_blocks_are_one_batched_call(doubles, monkeypatch, length):
    """Dense rows, all later blocks together, and the query: the number of calls does not depend on that of blocks."""
    monkeypatch.setattr(gpu, "operator_for", lambda *call: "flash")
    inputs = sharp_inputs(2, 4, 2, length, length, 16)

    def star(kernel):
        options = StarOptions(block_size=8, anchor_size=4, query_size=8, kernel=kernel)
        return attention(*inputs, Mask(causal=True), scale=0.25, softcap=None, dropout=0.0, options=options)

    expected = star("reference")
    part = star("aten")
    torch.testing.assert_close(part.out, expected.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part.lse, expected.lse, atol=1e-5, rtol=1e-5)
    assert doubles.called == ["flash"] * 5  # blocks and the query are a full part and a causal one each


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_mask_tensors_go_to_the_efficient_operator(doubles, dtype):
    query, key, value = sharp_inputs(2, 4, 2, 17, 23, 16)
    seen = torch.rand(2, 1, 17, 23) > 0.4
    seen[1, :, 3] = False
    bias = seen if dtype == torch.bool else torch.where(seen, torch.randn(2, 1, 17, 23), -torch.inf)
    part = attend(query, key, value, mask=bias, kernel="aten")
    out, lse = dense_attention(query, key, value, seen, bias=None if dtype == torch.bool else bias)
    torch.testing.assert_close(part.out, out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(part.lse, lse, atol=1e-5, rtol=1e-5)
    assert doubles.called == ["efficient"]


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "flash"), (torch.float32, "efficient")])
def test_shapes_and_gradients_by_pytorchs_own_meta_kernels(dtype, name):
    """The real operators on the meta device: they accept the call, and the shapes are right."""
    assert gpu.operator_for(torch.empty(1, 2, 3, 8, dtype=dtype, device="meta"), *[torch.empty(0)] * 2, False) == name
    query = torch.empty(2, 6, 40, 24, dtype=dtype, device="meta", requires_grad=True)
    key, value = (torch.empty(2, 2, 60, 24, dtype=dtype, device="meta", requires_grad=True) for _ in range(2))
    part = attend(query, key, value, is_causal=True, kernel="aten")
    assert part.out.shape == query.shape and part.lse.shape == (2, 6, 40) and part.lse.dtype == torch.float32
    grads = torch.autograd.grad(part.out.float().sum() + part.lse.sum(), (query, key, value))
    assert [g.shape for g in grads] == [query.shape, key.shape, value.shape]


@pytest.mark.gpu
@pytest.mark.parametrize("operator", ["flash", "efficient", "cudnn"])
@pytest.mark.parametrize("name", CALLS)
def test_the_real_operators(monkeypatch, name, operator):
    fields, rows, keys = CALLS[name]
    monkeypatch.setattr(gpu, "operator_for", lambda q, k, v, bias: "efficient" if bias else operator)
    inputs = [x.cuda().bfloat16() for x in sharp_inputs(2, 4, 2, rows, keys, 64)]
    visible = visibility(rows, keys, **fields).cuda()
    plain = {
        "causal" if k == "is_causal" else k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in fields.items()
    }
    part = attend(*inputs, mask=Mask(**plain), kernel="aten")
    ref, low = dense_attention(*(x.double() for x in inputs), visible), dense_attention(*inputs, visible)
    assert_close_to_reference(part.out, low[0], ref[0])
