"""Each private name of PyTorch: it exists and does what we lean on; taken away, one sentence says so."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d

from hf_attn_plugins.core import compat
from hf_attn_plugins.core.imports import is_being_imported

NAMES = [
    f"_scaled_dot_product_{kind}"
    for kind in (
        "flash_attention_for_cpu",
        "flash_attention_for_cpu_backward",
        "flash_attention",
        "flash_attention_backward",
        "efficient_attention",
        "efficient_attention_backward",
        "cudnn_attention",
    )
]


def sentence(name: str, purpose: str) -> str:
    """A regular expression for the one sentence of an upgrade that took `name` away."""
    return rf"^torch {torch.__version__.split('+')[0]}.* has no .*{name}.* needs to {purpose}.*: install torch=="


def exact(query, key, value):
    scores = query.double() @ key.double().mT * query.shape[-1] ** -0.5
    return scores.softmax(-1) @ value.double(), scores.logsumexp(-1)


def test_fused_operator_returns_out_and_lse():
    query, key, value = (torch.randn(2, 3, 7, 8) for _ in range(3))
    out, lse = compat.fused_operator(NAMES[0])(query, key, value, 0.0, False)
    expected_out, expected_lse = exact(query, key, value)
    torch.testing.assert_close(out, expected_out.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse.float(), rtol=1e-4, atol=1e-5)


def test_fused_backward_gives_the_gradient():
    query, key, value = (torch.randn(2, 3, 7, 8) for _ in range(3))
    out, lse = compat.fused_operator(NAMES[0])(query, key, value, 0.0, False)
    grad = torch.randn_like(out)
    got = compat.fused_operator(NAMES[1])(grad, query, key, value, out, lse, 0.0, False)
    inputs = [x.clone().requires_grad_() for x in (query, key, value)]
    expected = torch.autograd.grad(exact(*inputs)[0], inputs, grad.double())
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_fused_operators_exist_and_say_so_when_gone(name, monkeypatch):
    assert callable(compat.fused_operator(name))
    monkeypatch.setattr(compat.torch, "ops", SimpleNamespace(aten=SimpleNamespace()))
    monkeypatch.delattr(torch, name, raising=False)
    with pytest.raises(NotImplementedError, match=sentence(name, "use PyTorch's fused attention")):
        compat.fused_operator(name)


def arguments(name: str) -> list[str]:
    return [argument.name for argument in getattr(torch.ops.aten, name).default._schema.arguments]


def test_operators_take_what_we_hand_them():
    """The schemas stand in every build of PyTorch; without a GPU they are all that can be looked at."""
    assert arguments(NAMES[0]) == ["query", "key", "value", "dropout_p", "is_causal", "attn_mask", "scale"]
    forward = ["query", "key", "value", "dropout_p", "is_causal", "return_debug_mask"]
    assert arguments(NAMES[2])[:6] == forward and "scale" in arguments(NAMES[2])
    backward = [
        "grad_out",
        "query",
        "key",
        "value",
        "out",
        "logsumexp",
        "cum_seq_q",
        "cum_seq_k",
        "max_q",
        "max_k",
        "dropout_p",
        "is_causal",
    ]
    assert arguments(NAMES[3])[:14] == [*backward, "philox_seed", "philox_offset"]
    assert arguments(NAMES[4])[:7] == [
        "query",
        "key",
        "value",
        "attn_bias",
        "compute_log_sumexp",
        "dropout_p",
        "is_causal",
    ]
    backward = ["grad_out_", "query", "key", "value", "attn_bias", "out", "logsumexp", "philox_seed", "philox_offset"]
    assert arguments(NAMES[5])[:12] == [*backward, "dropout_p", "grad_input_mask", "is_causal"]
    forward = [
        "query",
        "key",
        "value",
        "attn_bias",
        "compute_log_sumexp",
        "dropout_p",
        "is_causal",
        "return_debug_mask",
    ]
    assert arguments(NAMES[6])[:8] == forward and "scale" in arguments(NAMES[6])
    for name in (NAMES[4], NAMES[6]):
        assert [r.name for r in getattr(torch.ops.aten, name).default._schema.returns][1] in ("log_sumexp", "logsumexp")


def test_flex_attention_returns_the_lse_and_takes_tiles():
    query, key, value = (torch.randn(1, 2, 9, 16) for _ in range(3))
    one, none = torch.ones(1, 1, 1, dtype=torch.int32), torch.zeros(1, 1, 1, dtype=torch.int32)
    index = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    mask = compat.block_mask_of((one, index, none, index), 128, lambda b, h, q, k: k <= q, (9, 9))
    out, lse = compat.flex_attention(False)(query, key, value, None, mask, 0.25, False)
    scores = (query.double() @ key.double().mT * 0.25).masked_fill(torch.ones(9, 9).triu(1) > 0, -torch.inf)
    torch.testing.assert_close(out, (scores.softmax(-1) @ value.double()).float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, scores.logsumexp(-1).float(), rtol=1e-4, atol=1e-5)


def test_fake_tensors_are_known(monkeypatch):
    from torch._subclasses import fake_tensor

    with fake_tensor.FakeTensorMode():
        assert compat.is_fake(torch.empty(1))
    assert not compat.is_fake(torch.empty(1))
    monkeypatch.delattr(fake_tensor, "FakeTensor")
    with pytest.raises(NotImplementedError, match=sentence("FakeTensor", "notice tensors without numbers")):
        compat.is_fake(torch.empty(1))


def test_random_state_of_flash():
    returns = getattr(torch.ops.aten, NAMES[2]).default._schema.returns
    assert len(returns) == 9 and [returns[i].name for i in (0, 1)] == ["output", "logsumexp"]
    assert [r.name for r in returns[2:6]] == ["cum_seq_q", "cum_seq_k", "max_q", "max_k"]
    assert compat.rng_state_of_flash(list(range(7))) == (0, 1, 2, 3, 4, 5)
    with pytest.raises(
        NotImplementedError,
        match=sentence(NAMES[2], "compute its grad"),
    ):
        compat.rng_state_of_flash([0, 1, 2, 3])


def test_multihead_attention_calls_our_function_and_nobody_elses():
    module, calls = nn.MultiheadAttention(8, 2), []

    def sdpa(query, key, value, *args, **kwargs):
        calls.append(query.shape)
        return torch.zeros_like(query)

    x = torch.randn(5, 1, 8)
    arguments = (x, x, x, 8, 2, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0)
    routed = compat.multihead_attention_with(sdpa)
    out, _ = routed(*arguments, module.out_proj.weight, module.out_proj.bias, training=False, need_weights=False)
    assert len(calls) == 1
    torch.testing.assert_close(out, module.out_proj.bias.expand_as(out))
    module.eval()(x, x, x, need_weights=False)
    assert len(calls) == 1


def test_multihead_attention_that_no_longer_asks_sdpa(monkeypatch):
    def other(*args):
        return args

    monkeypatch.setattr(compat, "multi_head_attention_forward", other)
    with pytest.raises(NotImplementedError, match=sentence("scaled_dot_product_attention", "route its attention")):
        compat.multihead_attention_with(lambda: None)
    monkeypatch.setattr(compat, "multi_head_attention_forward", len)  # compiled code has no globals to replace
    with pytest.raises(NotImplementedError, match=sentence("scaled_dot_product_attention", "route its attention")):
        compat.multihead_attention_with(lambda: None)


def test_default_store(tmp_path, monkeypatch):
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        compat.default_store().set("key", "value")
        assert compat.default_store().get("key") == b"value"
    finally:
        dist.destroy_process_group()
    monkeypatch.delattr(distributed_c10d, "_get_default_store")
    with pytest.raises(NotImplementedError, match=sentence("_get_default_store", "tell the other ranks")):
        compat.default_store()


def test_version_counts_writes():
    parameter = nn.Parameter(torch.zeros(3))
    before = compat.version_of(parameter)
    with torch.no_grad():
        parameter.add_(1)
    assert compat.version_of(parameter) == before + 1
    with torch.inference_mode():
        assert compat.version_of(nn.Parameter(torch.zeros(3))) == -1
    without = SimpleNamespace(is_inference=lambda: False)
    with pytest.raises(NotImplementedError, match=sentence("_version", "notice that a tensor has changed")):
        compat.version_of(without)


def test_cpu_features(monkeypatch):
    for feature in ("avx512_bf16", "amx_tile"):
        asked = f"_is_{feature}_supported"
        assert hasattr(torch.cpu, asked)
        monkeypatch.setattr(torch.cpu, asked, lambda: True)
        monkeypatch.setattr(torch.cpu, "_init_amx", lambda: True)
        assert compat.cpu_has(feature) is True
        monkeypatch.delattr(torch.cpu, asked)
        assert compat.cpu_has(feature) is False
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: False)  # Linux says no
    assert compat.cpu_has("amx_tile") is False


def test_block_mask_can_be_derived_from_without_its_init(monkeypatch):
    base = compat.block_mask_type()

    class Bare(base):
        def __init__(self):
            pass

    assert isinstance(Bare(), base)
    from torch.nn.attention import flex_attention

    monkeypatch.delattr(flex_attention, "BlockMask")
    with pytest.raises(NotImplementedError, match=sentence("BlockMask", "carry a mask")):
        compat.block_mask_type()


def test_a_compiled_model_holds_the_model():
    model = nn.Linear(2, 2)
    wrapped = torch.compile(model, backend="eager")
    assert compat.inside_compiled(wrapped) is model
    with pytest.raises(NotImplementedError, match=sentence("_orig_mod", "look inside a compiled model")):
        compat.inside_compiled(model)


REGISTER = ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook",
            "register_full_backward_pre_hook"]  # fmt: skip


@pytest.mark.parametrize("register", REGISTER)
def test_every_kind_of_hook_is_seen(register):
    module = nn.Linear(2, 2)
    assert compat.hooks_of(module) == []
    handle = getattr(module, register)(print)
    assert compat.hooks_of(module) == [print]
    handle.remove()
    assert compat.hooks_of(module) == []


def test_forward_hooks_are_taken_off_and_put_back():
    module, calls = nn.Linear(2, 2), []
    module.register_forward_hook(lambda *_: calls.append("after"))
    module.register_forward_pre_hook(lambda *_: calls.append("before"))
    held = compat.swap_forward_hooks(module)
    module(torch.zeros(2))
    assert calls == []
    compat.swap_forward_hooks(module, held)
    module(torch.zeros(2))
    assert calls == ["before", "after"]


def test_a_module_whose_hooks_are_kept_elsewhere():
    module = nn.Linear(2, 2)
    del module._forward_pre_hooks
    with pytest.raises(NotImplementedError, match=sentence("_forward_pre_hooks", "see the hooks of a module")):
        compat.hooks_of(module)
    with pytest.raises(NotImplementedError, match=sentence("_forward_pre_hooks", "run a model unseen by its hooks")):
        compat.swap_forward_hooks(module)


def test_replicas_are_made_by_our_function(monkeypatch):
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)
    compat.replicate_by(module, lambda: other)
    assert module._replicate_for_data_parallel() is other
    copied = compat.replica_of(module)
    assert compat.is_replica(copied) and not compat.is_replica(module)
    assert compat.is_replica(copied._replicate_for_data_parallel()), "by PyTorch's method: ours was left out"
    before = set(vars(nn.Linear(2, 2)))
    compat.replicate_by(module, None)
    assert set(vars(module)) == before
    monkeypatch.delattr(nn.Module, "_replicate_for_data_parallel")
    for call in (lambda: compat.replicate_by(module, None), lambda: compat.replica_of(module)):
        with pytest.raises(NotImplementedError, match=sentence("_replicate_for_data_parallel", "keep tables out of")):
            call()


def test_transforms_are_noticed(monkeypatch):
    seen = []

    def noted(x):
        seen.append(compat.is_transforming())
        return x.sum()

    noted(torch.ones(2))
    torch.func.grad(noted)(torch.ones(2))
    torch.func.vmap(noted)(torch.ones(2, 2))
    with torch.autograd.forward_ad.dual_level():
        noted(torch.ones(2))
    noted(torch.ones(2))
    assert seen == [False, True, True, True, False]
    monkeypatch.delattr(torch.autograd.forward_ad, "_current_level")
    with pytest.raises(NotImplementedError, match=sentence("_current_level", "notice torch.func")):
        compat.is_transforming()
    monkeypatch.setattr(torch._C, "_functorch", SimpleNamespace())
    with pytest.raises(NotImplementedError, match=sentence("peek_interpreter_stack", "notice torch.func")):
        compat.is_transforming()


def test_a_tensor_without_elements_sees_every_operator(monkeypatch):
    class Bare(torch.Tensor):
        __torch_function__ = compat.no_torch_function()

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            asked.append(func)
            return torch.zeros(1)

    asked = []
    made = compat.without_data(Bare, (10**6, 10**6), torch.bool, torch.device("cpu"))
    assert type(made) is Bare and made.shape == (10**6, 10**6) and made.dtype == torch.bool
    made + made, made.to("meta")
    assert asked == [torch.ops.aten.add.Tensor, compat.copy_operator()]
    monkeypatch.setattr(compat, "Tensor", SimpleNamespace())
    with pytest.raises(NotImplementedError, match=sentence("_make_wrapper_subclass", "carry a mask")):
        compat.without_data(Bare, (1,), torch.bool, torch.device("cpu"))
    monkeypatch.setattr(torch, "_C", SimpleNamespace())
    with pytest.raises(NotImplementedError, match=sentence("_disabled_torch_function_impl", "carry a mask")):
        compat.no_torch_function()
    monkeypatch.setattr(compat.torch, "ops", SimpleNamespace(aten=SimpleNamespace()))
    with pytest.raises(NotImplementedError, match=sentence("_to_copy", "carry a mask")):
        compat.copy_operator()


def test_a_module_that_is_still_being_imported(tmp_path, monkeypatch):
    (tmp_path / "half_way.py").write_text(
        "import sys\nfrom hf_attn_plugins.core.imports import is_being_imported\n"
        "during = is_being_imported(sys.modules[__name__])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import half_way

    assert half_way.during is True and is_being_imported(half_way) is False
    del sys.modules["half_way"]
    assert is_being_imported(None) is False and is_being_imported(ModuleType("bare")) is False


def test_modes_are_noticed(monkeypatch):
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    with torch.device("cpu"):
        assert compat.modes() == []
        with TorchFunctionMode() as functions, TorchDispatchMode() as operators:
            assert compat.modes() == [functions, operators]
    monkeypatch.delattr(torch.overrides, "_get_current_function_mode_stack")
    with pytest.raises(NotImplementedError, match=sentence("_get_current_function_mode_stack", "notice modes")):
        compat.modes()
