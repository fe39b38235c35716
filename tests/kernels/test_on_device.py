"""What runs on GPUs and other devices that are not here, decided on stand-ins for their tensors."""

from __future__ import annotations

import functools
import importlib
import logging

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hf_attn_plugins import cqs
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial, with_sinks
from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.kernels import attend, measured, on_device
from hf_attn_plugins.kernels.attend_rectangles import attend_rectangles
from hf_attn_plugins.kernels.flex import attend as flex
from hf_attn_plugins.star.entry import attention as star_attention
from hf_attn_plugins.star.options import StarOptions
from hf_attn_plugins.testing import dense_attention, sharp_inputs, visibility
from tests.kernels.stand_in import NAME, StandIn, pretend, tensors

choosing = importlib.import_module("hf_attn_plugins.kernels.choose")


@pytest.fixture(autouse=True)
def gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    pretend(monkeypatch)
    measured.forget()
    yield
    measured.forget()
    flex._failed.clear()


def name_of(call, mask=None, softcap=None, dropout=0.0, kernel=None):
    return choosing.choose(*call, mask or Mask(causal=True), softcap, dropout, kernel).name


some = torch.ones(2, 4096, dtype=torch.bool)
in_tensor = torch.zeros((), dtype=torch.long)

CALLS = {
    "causal": (tensors(), {}, "aten"),
    "full": (tensors(), dict(mask=Mask()), "aten"),
    "an offset": (tensors(100, 4096), dict(mask=Mask(causal=True, offset=17)), "aten"),
    "an offset beyond the keys": (tensors(100, 50), dict(mask=Mask(causal=True, offset=17)), "aten"),
    "decode": (tensors(1, 4096), {}, "aten"),
    "padding": (tensors(), dict(mask=Mask(causal=True, key_padding=some)), "aten"),
    "decode with padding": (tensors(1, 4096), dict(mask=Mask(key_padding=some)), "aten"),
    "a static cache": (tensors(1, 4096), dict(mask=Mask(causal=True, offset=in_tensor)), "aten"),
    "many rows into one": (tensors(100, 4096), dict(mask=Mask(causal=True, offset=in_tensor)), "aten"),
    "a mask tensor": (tensors(), dict(mask=Mask(bias=some[:, None, None])), "aten"),
    "float32": (tensors(dtype=torch.float32), {}, "aten"),
    "training": (tensors(requires_grad=True), {}, "aten"),
    "head_dim 256": (tensors(head_dim=256), {}, "aten"),
    "head_dim 576": (tensors(head_dim=576), {}, "aten"),
    "softcap": (tensors(), dict(softcap=30.0), "flex"),
    "window": (tensors(), dict(mask=Mask(causal=True, window=(100, None))), "flex"),
    "packed": (tensors(), dict(mask=Mask(causal=True, query_segments=some, key_segments=some)), "flex"),
    "prefix": (tensors(), dict(mask=Mask(causal=True, prefix=9)), "flex"),
    "predicate": (tensors(), dict(mask=Mask(predicate=lambda b, h, q, k: q >= k)), "flex"),
    "a mask tensor beside padding": (tensors(), dict(mask=Mask(bias=some[:, None, None], key_padding=some)), "flex"),
    "dropout": (tensors(), dict(dropout=0.1), "triton"),
    "dropout under a predicate": (
        tensors(), dict(dropout=0.1, mask=Mask(predicate=lambda b, h, q, k: q >= k)), "cpu_tiled",
    ),
    "float64": (tensors(dtype=torch.float64), {}, "cpu_tiled"),
    "named": (tensors(), dict(kernel="triton"), "triton"),
    "named flex": (tensors(), dict(kernel="flex"), "flex"),
}  # fmt: skip


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm100", "sm120", "gfx942"])
@pytest.mark.parametrize("name", CALLS)
def test_the_default_on_a_gpu(monkeypatch, name, arch):
    pretend(monkeypatch, arch)
    call, options, expected = CALLS[name]
    assert name_of(call, **options) == expected


def test_chips_without_operators_of_pytorch(monkeypatch):
    pretend(monkeypatch, "gfx1100")
    assert name_of(tensors()) == "flex"
    pretend(monkeypatch, "sm75")
    assert name_of(tensors()) == "flex" and name_of(tensors(dtype=torch.float16)) == "aten"
    assert name_of(tensors(), dropout=0.1) == "cpu_tiled"  # Triton's kernels need sm_80


def test_without_triton_flex_is_not_there(monkeypatch):
    monkeypatch.setattr("hf_attn_plugins.kernels.flex.attend.INSTALLED", False)
    monkeypatch.setattr("hf_attn_plugins.kernels.triton.support.INSTALLED", False)
    assert name_of(tensors(), softcap=5.0) == "cpu_tiled" and name_of(tensors()) == "aten"


def test_where_compiling_is_switched_off_flex_would_make_all_scores(monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert name_of(tensors(), softcap=5.0) == "triton"


def test_kernels_that_failed_their_self_test_are_not_taken(monkeypatch):
    monkeypatch.setattr(on_device, "triton_passes", lambda *call, plan=False: False)
    assert name_of(tensors(), dropout=0.1) == "cpu_tiled" and name_of(tensors(), kernel="triton") == "triton"
    assert choosing.choose_rectangles(*tensors(), Mask(causal=True), None, 0.1, None) is None


@pytest.mark.parametrize("device", ["mps", "xpu", "privateuseone"])
def test_other_devices_compute_tiles_of_ordinary_operators(device):
    call = tensors(device=torch.device(device), dtype=torch.float16)
    for options in ({}, dict(softcap=5.0), dict(dropout=0.1), dict(mask=Mask(causal=True, key_padding=some))):
        assert name_of(call, **options) == "cpu_tiled"
    assert choosing.choose_rectangles(*call, Mask(causal=True), None, 0.0, None) is None
    with pytest.raises(NotImplementedError, match=f"{device}: no operator of PyTorch there has shown that its lse is"):
        choosing.choose(*call, Mask(), None, 0.0, "aten").run(*call, Mask(), 1.0, None, 0.0)
    with pytest.raises(NotImplementedError, match=f"tensors on {device}"):
        choosing.choose(*call, Mask(), None, 0.0, "triton").run(*call, Mask(), 1.0, None, 0.0)
    reason = flex.reason_against(*call, Mask(causal=True), 5.0, 0.0)  # by name
    assert reason is None if device == "xpu" else reason == f"tensors on {device}"


class NoFloat64(TorchDispatchMode):
    """Devices such as Apple's have no float64: an operator that makes some would fail there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            assert not (isinstance(each, torch.Tensor) and each.dtype == torch.float64), func
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_tiles_and_merges_make_no_float64(dtype):
    inputs = [x.to(dtype).requires_grad_() for x in sharp_inputs(2, 4, 2, 40, 40, 16)]
    index = torch.arange(40)
    masks = [
        Mask(causal=True),
        Mask(causal=True, window=(9, None), prefix=3),
        Mask(key_padding=(index > 4).expand(2, 40)),
    ]
    pieces = [Rectangle(0, 40, 0, 10, True), Rectangle(10, 40, 10, 40, True)]
    star = functools.partial(star_attention, scale=0.25, dropout=0.0, options=StarOptions(9, 4, 5, kernel="cpu_tiled"))
    with NoFloat64():
        for mask in masks:
            attend(*inputs, mask=mask, softcap=4.0, dropout=0.3, kernel="cpu_tiled").out.sum().backward()
            part = attend_rectangles(*inputs, pieces, mask=mask.replace(offset=0), kernel="cpu_tiled")
            (part.out.sum() + part.lse.clamp_min(-9).sum()).backward()
        star(*inputs, Mask(causal=True), softcap=None).out.sum().backward()
        cqs.attention(*inputs, cqs.plan(40, 7), is_causal=True, kernel="cpu_tiled").out.sum().backward()
        with_sinks(Partial(part.out.detach(), part.lse.detach()), torch.zeros(4, dtype=dtype))
    with pytest.raises(AssertionError), NoFloat64():
        attend(*(x.double() for x in inputs), kernel="cpu_tiled")


def rows(**ms):
    return [measured.Row(NAME, measured.versions(), "bfloat16", 128, what, 8192, ms) for what in measured.KINDS]


def test_a_measurement_on_this_kind_of_gpu_changes_the_order(monkeypatch):
    measured.save(rows(flash=2.0, triton=1.0, flex=1.5))
    for call in (tensors(), tensors(1, 4096), tensors(requires_grad=True)):
        assert name_of(call) == "triton"
    assert name_of(tensors(), softcap=5.0) == "triton"
    assert name_of(tensors(head_dim=64)) == "aten" and name_of(tensors(dtype=torch.float16)) == "aten"
    assert choosing.choose_rectangles(*tensors(), Mask(causal=True), None, 0.0, None) is not None
    pretend(monkeypatch, name="NVIDIA A100-SXM4-40GB")
    assert name_of(tensors()) == "aten"


def test_a_small_gain_changes_nothing():
    measured.save(rows(flash=1.04, triton=1.0))
    assert name_of(tensors()) == "aten"


def test_the_operator_follows_the_measurement():
    from hf_attn_plugins.kernels.aten import gpu as aten_gpu

    assert aten_gpu.operator_for(*tensors(), False) == "flash"
    measured.save(rows(flash=2.0, cudnn=1.0, triton=3.0))
    assert aten_gpu.operator_for(*tensors(), False) == "cudnn" and name_of(tensors()) == "aten"
    assert aten_gpu.operator_for(*tensors(requires_grad=True), False) == "flash"  # cuDNN is not used for gradients


def one_launch(mask=None, softcap=None, dropout=0.0, plan=None, kernel=None, call=None):
    """The kernel that computes a plan in one launch, by the name of its function; None for calls of their own."""
    mask = Mask(causal=True) if mask is None else mask
    found = choosing.choose_rectangles(*(call or tensors()), mask, softcap, dropout, kernel, plan)
    return found and found.__name__.removesuffix("_rectangles")


WINDOW = Mask(causal=True, window=(100, None))
PLAN = [[Rectangle(0, 4096, 0, 1024, True), Rectangle(2048, 4096, 1024, 4096, True)]]
TWICE = [[Rectangle(0, 4096, 0, 1024, True), Rectangle(2048, 4096, 1000, 4096, True)]]  # keys 1000 to 1024 twice
PLANS = {
    "plain: blocks of PyTorch's operators": ({}, None),
    "the same, with its rectangles": (dict(plan=PLAN), None),
    "padding": (dict(mask=Mask(causal=True, key_padding=some), plan=PLAN), None),
    "softcap": (dict(softcap=30.0), "flex"),
    "softcap, with its rectangles": (dict(softcap=30.0, plan=PLAN), "flex"),
    "window": (dict(mask=WINDOW, plan=PLAN), "flex"),
    "packed": (dict(mask=Mask(causal=True, query_segments=some, key_segments=some), plan=PLAN), "flex"),
    "a mask tensor beside padding": (dict(mask=Mask(bias=some[:, None, None], key_padding=some), plan=PLAN), "flex"),
    "pairs of two rectangles": (dict(mask=WINDOW, plan=TWICE), "triton"),
    "dropout": (dict(dropout=0.1, plan=PLAN), "triton"),
    "dropout under a predicate": (dict(dropout=0.1, mask=Mask(predicate=lambda b, h, q, k: q >= k)), None),
    "named triton": (dict(kernel="triton"), "triton"),
    "named flex": (dict(kernel="flex"), "flex"),
    "named aten": (dict(kernel="aten"), None),
}


@pytest.mark.parametrize("arch", ["sm80", "sm90", "sm120", "gfx942"])
@pytest.mark.parametrize("name", PLANS)
def test_a_plan_goes_to_pytorchs_operators_then_flex_then_triton(monkeypatch, name, arch):
    pretend(monkeypatch, arch)
    options, expected = PLANS[name]
    assert one_launch(**options) == expected


def test_a_plan_without_flex_or_triton(monkeypatch):
    monkeypatch.setattr("hf_attn_plugins.kernels.flex.attend.INSTALLED", False)
    assert one_launch(softcap=5.0, plan=PLAN) == "triton"
    monkeypatch.setattr(on_device, "triton_passes", lambda *call, plan=False: False)
    assert one_launch(softcap=5.0, plan=PLAN) is None  # tiles, rectangle by rectangle


def test_a_measured_plan_changes_the_order():
    measured.save(rows(flash=2.0, triton=1.5, flex=1.0))
    assert one_launch(plan=PLAN) == "flex" and one_launch(plan=TWICE) is None
    measured.save(rows(flash=2.0, triton=1.0, flex=1.5))
    assert one_launch(plan=PLAN) == one_launch(softcap=5.0, plan=PLAN) == "triton"


def test_a_plan_whose_flex_call_cannot_be_compiled_goes_on_without(monkeypatch, caplog):
    inputs, pieces = sharp_inputs(1, 2, 2, 8, 8, 16), [Rectangle(0, 8, 0, 8, True)]
    tried = []

    def broken(*given):
        tried.append(1)
        raise flex.Failed("InductorError: nothing")

    monkeypatch.setattr(flex, "flex_rectangles", broken)
    monkeypatch.setattr(choosing, "PLAIN", ())  # tensors of the CPU are decided as those of a GPU
    monkeypatch.setattr(on_device, "ranked", lambda *call, kind="": [] if flex._failed else ["flex"])
    with caplog.at_level(logging.WARNING, "hf_attn_plugins"):
        for _ in range(2):
            part = attend_rectangles(*inputs, pieces, mask=Mask(causal=True))
    assert tried == [1] and caplog.text.count("FlexAttention is off in this process") == 1
    torch.testing.assert_close(part.out, attend(*inputs, is_causal=True, kernel="reference").out)
    with pytest.raises(flex.Failed, match="InductorError"):
        attend_rectangles(*inputs, pieces, kernel="flex")


def test_flex_that_cannot_be_compiled_is_off_after_one_warning(monkeypatch, caplog):
    tried = []

    def broken(*call):
        tried.append(1)
        raise flex.Failed("InductorError: nothing")

    monkeypatch.setattr(flex, "flex", broken)
    monkeypatch.setattr(choosing, "load", lambda name: lambda *call: Partial(name, None))
    call = (*tensors(), Mask(causal=True), 1.0, 5.0, 0.0)
    with caplog.at_level(logging.WARNING, "hf_attn_plugins"):
        choice = choosing.choose(*tensors(), Mask(causal=True), 5.0, 0.0)
        assert choice.name == "flex" and choice.run(*call).out == "triton"
    assert "FlexAttention is off in this process, 'triton' computes instead: InductorError" in caplog.text
    assert name_of(tensors(), softcap=5.0) == "triton" and len(tried) == 1


MASKS = {
    "causal": dict(is_causal=True),
    "window": dict(is_causal=True, window=(5, None)),
    "padding": dict(key_padding=torch.arange(80).view(2, 40) % 40 > 4),
    "prefix": dict(is_causal=True, prefix=6),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_name_the_device_of_every_tensor_that_they_make(name, dtype):
    """A tensor made without a device would land elsewhere here, and nothing could be computed with it."""
    inputs = [x.to(dtype).requires_grad_() for x in sharp_inputs(2, 4, 2, 40, 40, 16)]
    fields = {"causal" if k == "is_causal" else k: v for k, v in MASKS[name].items()}
    expected = dense_attention(*(x.detach().double() for x in inputs), visibility(40, 40, **MASKS[name]))[0]
    with torch.device("meta"):
        part = attend(*inputs, mask=Mask(**fields), softcap=None, dropout=0.0, kernel="cpu_tiled")
        part.out.sum().backward()
        attend(*inputs, mask=Mask(**fields), softcap=4.0, dropout=0.3, kernel="cpu_tiled").out.sum().backward()
    torch.testing.assert_close(part.out.double(), expected, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0)
    assert all(x.grad.device.type == "cpu" for x in inputs)


def test_stand_ins_have_what_a_choice_asks_for():
    assert StandIn((1, 2, 3, 4)).numel() == 24 and StandIn((1,)).device.type == "cuda"


@pytest.mark.parametrize("measured_rows", [False, True])
def test_the_choice_can_be_traced(monkeypatch, measured_rows):
    """Inside of a graph: FlexAttention and the self-test are left out, everything else is decided as outside."""
    torch.compiler.reset()  # a compiled graph keeps what was measured when it was traced
    if measured_rows:
        measured.save(rows(flash=2.0, triton=1.0))
    calls = [tensors(), tensors(), tensors(1, 4096), tensors()]
    masks = [Mask(causal=True), Mask(causal=True), Mask(causal=True, offset=in_tensor), Mask(causal=True)]
    softcaps, dropouts = (None, 5.0, None, None), (0.0, 0.0, 0.0, 0.1)

    @torch.compile(backend="eager", fullgraph=True)
    def names(x):
        found = [on_device.kernel_for(*c, *rest) for c, *rest in zip(calls, masks, softcaps, dropouts, strict=True)]
        return x + 1, found

    found = names(torch.zeros(1))[1]
    assert found == (["triton"] * 4 if measured_rows else ["aten", "triton", "aten", "triton"])
