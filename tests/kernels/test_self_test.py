"""The self-test of the Triton kernels, in the interpreter: right kernels pass, planted wrong ones are turned off."""

from __future__ import annotations

import json
import logging

import pytest
import torch

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.warn import forget_warnings
from tests.kernels.triton_cases import draw, needs_interpreter

pytestmark = needs_interpreter
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def testing(monkeypatch, tmp_path):
    from hf_attn_plugins.kernels.triton import self_test, trial

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(self_test.SWITCH, raising=False)
    # Tiles of the interpreter, which takes a tenth of a second for one, instead of those of a GPU.
    small = {"ROWS": 10, "MORE_KEYS": 9, "DECODE_KEYS": 40, "NEAR": 4, "BATCH": 1, "HEADS": 2, "KV_HEADS": 1}
    for name, size in small.items():
        monkeypatch.setattr(trial, name, size)
    self_test.forget()
    forget_warnings()
    yield self_test
    self_test.forget()


def plain(**more):
    from hf_attn_plugins.kernels.triton.trial import Trial

    nothing = dict.fromkeys(Trial._fields[5:], False) | {"bias": ""}
    return Trial(**(nothing | dict(decode=False, backward=False, dtype="float32", head_dim=16, head_dim_v=16) | more))


TRIALS = {
    "full": {},
    "causal and backward": dict(causal=True, backward=True),
    "window": dict(causal=True, left=True, backward=True),
    "two-sided window": dict(left=True, right=True),
    "prefix": dict(causal=True, prefix=True),
    "padding": dict(causal=True, padding=True, backward=True),
    "segments": dict(causal=True, segments=True),
    "bool bias": dict(bias="bool"),
    "float bias and softcap": dict(bias="float", softcap=True),
    "softcap and backward": dict(causal=True, softcap=True, backward=True),
    "dropout": dict(dropout=True),
    "plan": dict(causal=True, plan=True, backward=True),
    "decode": dict(decode=True, causal=True),
    "decode, offset in a tensor": dict(decode=True, causal=True, tensor_offset=True, padding=True),
    "half": dict(dtype="float16", causal=True, head_dim=24, head_dim_v=16),
}


QUICK = ("causal and backward", "decode", "dropout", "plan")


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.grid) for name in TRIALS]
)
def test_right_kernels_pass(testing, name):
    assert testing.mismatch(plain(**TRIALS[name]), CPU) is None


WRONG = {
    "out": lambda out, lse, row_lse: (out * 1.05, lse, row_lse),
    "lse": lambda out, lse, row_lse: (out, lse + 0.01, row_lse),
    "heads": lambda out, lse, row_lse: (out.flip(1), lse.flip(1), row_lse),
    "nan": lambda out, lse, row_lse: (out.index_fill(2, torch.tensor(2), torch.nan), lse, row_lse),
    "nothing": lambda out, lse, row_lse: (torch.zeros_like(out), torch.full_like(lse, -torch.inf), row_lse),
}


@pytest.fixture
def plant(monkeypatch):
    """Let the forward of the kernels give something else."""

    def planted(change):
        from hf_attn_plugins.kernels.triton import launch

        right = launch.forward
        monkeypatch.setattr(launch, "forward", lambda *given: change(*right(*given)))

    return planted


@pytest.mark.parametrize(
    "name", [name if name == "nan" else pytest.param(name, marks=pytest.mark.grid) for name in WRONG]
)
def test_wrong_kernels_are_turned_off_with_one_warning(testing, plant, caplog, name):
    plant(WRONG[name])
    inputs = draw(1, 20, 20)  # 20 rows: no decoding; the small call of the test has its own size
    with caplog.at_level(logging.WARNING, "hf_attn_plugins"):
        for softcap in (None, None, 5.0):  # other features are off with them
            assert not testing.passes(*inputs, Mask(causal=True), softcap, 0.0)
    assert len(caplog.records) == 1 and "failed their self-test on cpu" in caplog.text
    for words in ("prefill, float32, head_dim 16, causal", "differs by", "Please report this line", testing.SWITCH):
        assert words in caplog.text
    assert not (testing.cache_folder() / "self_tests.json").exists()


def test_wrong_gradients_are_noticed(testing, monkeypatch):
    from hf_attn_plugins.kernels.triton import launch

    right = launch.backward
    monkeypatch.setattr(launch, "backward", lambda *given: (right(*given)[0], *(1.1 * x for x in right(*given)[1:])))
    assert testing.mismatch(plain(causal=True), CPU) is None
    assert testing.mismatch(plain(causal=True, backward=True), CPU).startswith("dk differs")


def test_kernels_that_do_not_compile_are_turned_off(testing, plant, caplog):
    plant(lambda *given: 1 / 0)
    with caplog.at_level(logging.WARNING, "hf_attn_plugins"):
        assert not testing.passes_trial(plain(), CPU)
    assert "ZeroDivisionError" in caplog.text


def test_out_of_memory_says_nothing_about_the_kernels(testing, plant):
    def full(*given):
        raise torch.OutOfMemoryError

    plant(full)
    assert testing.passes_trial(plain(), CPU) and not testing._seen


def test_the_switch_turns_it_off(testing, plant, monkeypatch):
    plant(WRONG["out"])
    monkeypatch.setenv(testing.SWITCH, "0")
    assert testing.passes(*draw(1, 20, 20), Mask(causal=True), None, 0.0) and not testing._seen


def test_what_passed_is_tested_once_and_kept(testing, monkeypatch):
    ran = []
    right = testing.mismatch
    monkeypatch.setattr(testing, "mismatch", lambda *given: ran.append(given) or right(*given))
    inputs = draw(1, 20, 20)
    for _ in range(3):
        assert testing.passes(*inputs, Mask(causal=True), None, 0.0)
    assert len(ran) == 1
    testing.forget()  # as a new process
    assert testing.passes(*inputs, Mask(causal=True), None, 0.0) and len(ran) == 1
    assert testing.passes(*inputs, Mask(causal=True), 5.0, 0.0) and len(ran) == 2  # another feature
    monkeypatch.setattr(testing, "versions", lambda: "torch 9")
    assert testing.passes(*inputs, Mask(causal=True), None, 0.0) and len(ran) == 3  # another version
    assert len(json.loads((testing.cache_folder() / "self_tests.json").read_text())["passed"]) == 3


@pytest.mark.parametrize("text", ["", "[]", '{"passed": ["a"]}', '{"format": "x", "passed": 3}', "\x00"])
def test_damaged_files_only_cost_another_test(testing, text):
    path = testing.cache_folder() / "self_tests.json"
    path.parent.mkdir()
    path.write_text(text)
    assert testing.passes_trial(plain(), CPU)


def test_a_cache_that_cannot_be_written_does_not_matter(testing, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert testing.passes_trial(plain(), CPU)


def test_it_changes_no_random_state_and_no_mode(testing):
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert testing.passes_trial(plain(dropout=True), CPU) and testing.passes_trial(plain(backward=True), CPU)
    assert torch.equal(torch.get_rng_state(), before)


def test_features_of_a_call(testing):
    query, key, value = draw(2, 20, 30)
    trial = testing.trial_of(query, key, value, Mask(causal=True, window=(3, None)), 5.0, 0.0)
    assert trial == plain(causal=True, left=True, softcap=True)
    assert testing.trial_of(query[:, :, :1], key, value, Mask(), None, 0.0).decode
    mask = Mask(key_padding=torch.ones(2, 30, dtype=torch.bool), offset=torch.tensor(3), bias=torch.zeros(20, 30))
    words = testing.trial_of(query.requires_grad_(), key, value, mask, None, 0.1, True).words()
    assert words == "prefill and backward, float32, head_dim 16, tensor offset, padding, dropout, plan, float bias"


def test_shapes_alone_are_not_tested(testing):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        inputs = [torch.empty(1, 2, 20, 16) for _ in range(3)]
        assert testing.passes(*inputs, Mask(), None, 0.0) and not testing._seen


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("name", TRIALS)
def test_on_a_gpu(name, dtype):
    from hf_attn_plugins.kernels.triton import self_test

    change = TRIALS[name] | dict(dtype=dtype, head_dim=128, head_dim_v=128)
    assert self_test.mismatch(plain(**change), torch.device("cuda")) is None
