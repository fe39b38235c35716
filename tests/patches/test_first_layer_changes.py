"""First-layer tables beside everything that changes what they are made from: the plain values, and one warning.

The oracle is always the same model without tables, changed in the same way.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hf_attn_plugins import register
from hf_attn_plugins.checkpoint import fingerprint
from hf_attn_plugins.checkpoint.attach import ATTRIBUTE, detach
from hf_attn_plugins.checkpoint.loader import TABLES

from .families import checkpoint, model_of
from .test_first_layer import IDS, attached, patch

register()


def attention(m):
    return m.model.layers[0].self_attn


def q(m):
    return attention(m).q_proj


def norm(m):
    return m.model.layers[0].input_layernorm


class Lora(nn.Module):
    def __init__(self, base):
        super().__init__()
        torch.manual_seed(1)
        self.base, self.A, self.B = base, nn.Linear(base.in_features, 4), nn.Linear(4, base.out_features)

    def forward(self, x):
        return self.base(x) + self.B(self.A(x))


def data_swap(m):
    q(m).weight.data[[0, 1]] = q(m).weight.data[[1, 0]]


def data_signs(m):
    q(m).weight.data[:, 1::2].neg_()


def numpy_alias(m):
    attention(m).k_proj.weight.detach().numpy()[3, 5] += 1.0


def embedding_data(m):
    m.model.embed_tokens.weight.data[IDS[0, 4]] += 0.1


def replaced(m):
    new = nn.Linear(32, q(m).out_features, bias=False)
    new.weight = q(m).weight
    attention(m).q_proj = new


def weight_of_another(m):
    q(m).weight = nn.Parameter(q(m).weight.detach() * 1.1)


def wrapped_forward(m):
    inner = q(m).forward
    q(m).forward = lambda x: inner(x) + 1


def norm_forward(m):
    norm(m).forward = lambda x: 2 * x


def another_norm(m):
    m.model.layers[0].input_layernorm = copy.deepcopy(m.model.layers[1].input_layernorm)


def resized(m):
    m.resize_token_embeddings(101, mean_resizing=False)
    m.get_input_embeddings().weight.data[97:] = 0.1
    m.lm_head.weight.data[97:] = 0.1


def parametrized(m):
    parametrize.register_parametrization(q(m), "weight", nn.Tanh())


def attention_pre_hook(m):
    attention(m).register_forward_pre_hook(
        lambda mod, args, kwargs: (args, {**kwargs, "hidden_states": kwargs["hidden_states"] * 1.1}), with_kwargs=True
    )


def layer_pre_hook(m):
    m.model.layers[0].register_forward_pre_hook(lambda mod, args: (args[0] * 1.1, *args[1:]))


def another_class(module):
    class Doubled(type(module)):
        def forward(self, x):
            return 2 * super().forward(x)

    module.__class__ = Doubled


def states_in_place(m):
    def double(mod, args, kwargs):
        kwargs["hidden_states"].data.mul_(2)  # leaves the version counter as it was
        kwargs["hidden_states"].detach().numpy()[0] += 1

    attention(m).register_forward_pre_hook(double, with_kwargs=True)


CHANGES = {
    "projection_class": lambda m: another_class(q(m)),
    "norm_class": lambda m: another_class(norm(m)),
    "states_in_place": states_in_place,
    "in_place": lambda m: q(m).weight.detach().add_(0.1),
    "data_add": lambda m: q(m).weight.data.add_(0.1),
    "data_one_value": lambda m: q(m).weight.data[3, 7].add_(0.5),
    "data_swap": data_swap,
    "data_signs": data_signs,
    "numpy_alias": numpy_alias,
    "embedding_data": embedding_data,
    "norm_data": lambda m: norm(m).weight.data.mul_(1.1),
    "set_data": lambda m: setattr(q(m).weight, "data", q(m).weight.data * 2),
    "weight_of_another": weight_of_another,
    "norm_eps": lambda m: setattr(norm(m), "variance_epsilon", 0.5),
    "embedding_hook": lambda m: m.model.embed_tokens.register_forward_hook(lambda mod, x, y: y + 1),
    "norm_hook": lambda m: norm(m).register_forward_hook(lambda mod, x, y: y + 1),
    "norm_pre_hook": lambda m: norm(m).register_forward_pre_hook(lambda mod, x: (x[0] * 1.3 + 1,)),
    "projection_hook": lambda m: q(m).register_forward_hook(lambda mod, x, y: y + 1),
    "projection_pre_hook": lambda m: q(m).register_forward_pre_hook(lambda mod, x: (x[0] + 1,)),
    "attention_pre_hook": attention_pre_hook,
    "layer_pre_hook": layer_pre_hook,
    "embedding_forward": lambda m: setattr(m.model.embed_tokens, "forward", lambda x: torch.ones(*x.shape, 32)),
    "wrapped_forward": wrapped_forward,
    "norm_forward": norm_forward,
    "another_norm": another_norm,
    "replaced": replaced,
    "lora": lambda m: setattr(attention(m), "v_proj", Lora(attention(m).v_proj)),
    "bias": lambda m: setattr(q(m), "bias", nn.Parameter(torch.ones(q(m).out_features))),
    "reordered": lambda m: setattr(m.model, "layers", nn.ModuleList(reversed(m.model.layers))),
    "removed": lambda m: m.model.layers.__delitem__(0),
    "resized": resized,
    "weight_norm": lambda m: weight_norm(q(m)) and q(m).weight_g.data.mul_(1.5),
    "weight_norm_new": lambda m: parametrizations.weight_norm(q(m)).parametrizations.weight.original0.data.mul_(1.5),
    "parametrized": parametrized,
    "pruned": lambda m: prune.l1_unstructured(q(m), "weight", amount=0.5),
    "half_and_back": lambda m: m.half().float(),
    "double": lambda m: m.double(),
    "bfloat16": lambda m: m.bfloat16(),
    "dynamic_quantisation": lambda m: torch.ao.quantization.quantize_dynamic(m, {nn.Linear}, inplace=True),
}


def warnings_of(caplog):
    return [r for r in caplog.records if "first-layer tables" in r.getMessage() and r.levelno == logging.WARNING]


def used(model):
    return getattr(model, ATTRIBUTE).looked_up


@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_a_change_gives_the_plain_values_and_one_warning(name, caplog):
    plain, model = model_of("llama"), attached(model_of("llama"))
    before = model(IDS).logits
    assert used(model) == 1
    for each in (plain, model):
        CHANGES[name](each)
    ids = IDS.clone()
    ids[:, 3] = 98 if name == "resized" else ids[:, 3]
    for _ in range(3):
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=0, atol=0)
    assert used(model) == 1 and len(warnings_of(caplog)) == 1, caplog.text
    if name not in ("half_and_back", "bfloat16", "double", "replaced", "resized"):
        assert not torch.allclose(plain(IDS).logits, before, rtol=1e-5, atol=1e-5), "the change changes nothing"


class DoubledFunctions(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        return made * 2 if func is F.linear else made


class DoubledOperators(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        return made * 2 if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default) else made


@pytest.mark.parametrize("mode", (DoubledFunctions, DoubledOperators))
@torch.no_grad()
def test_modes_see_the_projections(mode, caplog):
    plain, model = model_of("llama"), attached(model_of("llama"))
    with mode():
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=0, atol=0)
    assert not used(model) and len(warnings_of(caplog)) == 1
    with torch.device("cpu"):  # only says where new tensors go
        model(IDS)
    assert used(model) == 1


@pytest.mark.parametrize("kind", (nn.Linear, LlamaRMSNorm))
@torch.no_grad()
def test_a_class_whose_forward_is_replaced(kind, monkeypatch, caplog):
    plain, model = model_of("llama"), attached(model_of("llama"))
    of_class = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * of_class(self, x))
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=0, atol=0)
    assert not used(model) and len(warnings_of(caplog)) == 1


@torch.no_grad()
def test_tables_come_back_with_the_weights(caplog):
    model = attached(model_of("llama"))
    q(model).weight.data += 0.5
    model(IDS)
    assert used(model) == 0
    q(model).weight.data.copy_(q(model_of("llama")).weight)
    model(IDS)
    model(IDS[:, :1])
    assert used(model) == 2


@torch.no_grad()
def test_readers_of_the_norm_see_true_states_while_tables_are_used():
    plain, model, seen = model_of("llama"), attached(model_of("llama")), []
    for each in (plain, model):
        attention(each).register_forward_pre_hook(lambda m, a, k: seen.append(k["hidden_states"]), with_kwargs=True)
        each(IDS)
    assert torch.equal(*seen) and used(model) == 1


@torch.no_grad()
def test_equal_weights_in_other_storages_keep_the_tables(caplog):
    plain, model = model_of("llama"), attached(model_of("llama"))
    weights = {name: p.clone() for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, weights, (IDS,)).logits
    torch.testing.assert_close(out, plain(IDS).logits)
    model.load_state_dict(plain.state_dict())
    model(IDS)
    assert used(model) == 2 and not warnings_of(caplog)
    weights["model.layers.0.self_attn.q_proj.weight"] *= 1.5
    outs = [torch.func.functional_call(m, weights, (IDS,)).logits for m in (plain, model)]
    torch.testing.assert_close(*outs, rtol=0, atol=0)
    assert used(model) == 2 and len(warnings_of(caplog)) == 1


@pytest.mark.parametrize("wanted", ["norm", "embed", "q_proj", "lora", "all"])
def test_gradients(wanted, caplog):
    grads = []
    for model in (model_of("llama"), attached(model_of("llama"))):
        if wanted == "lora":
            model.requires_grad_(False)
            attention(model).q_proj, attention(model).v_proj = Lora(q(model)), Lora(attention(model).v_proj)
        else:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(wanted in name or wanted == "all")
        for _ in range(2):
            model(IDS, labels=IDS).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    assert grads[0] and len(warnings_of(caplog)) == 1
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_frozen_first_layer_is_looked_up_in_training():
    grads = []
    for model in (model_of("llama"), attached(model_of("llama"))):
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers.1" in name)
        model(IDS, labels=IDS).loss.backward()
        grads.append(model.model.layers[1].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-5)
    assert used(model) == 1


def test_forward_and_batched_transforms():
    plain, model = model_of("llama"), attached(model_of("llama"))
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = dict(plain.named_parameters())[name].detach()

    def loss(m):
        return lambda w: torch.func.functional_call(m, {name: w}, (IDS,), {"use_cache": False}).logits.square().mean()

    for m in (plain, model):
        m.set_attn_implementation("eager")
    a, b = (torch.func.grad(loss(m))(weight) for m in (plain, model))
    torch.testing.assert_close(a, b)
    batch = torch.stack([weight, 2 * weight])
    a, b = (torch.func.vmap(loss(m))(batch) for m in (plain, model))
    torch.testing.assert_close(a, b)
    a, b = (torch.func.jvp(loss(m), (weight,), (torch.ones_like(weight),)) for m in (plain, model))
    torch.testing.assert_close(a, b)
    assert used(model) == 0


@torch.no_grad()
def test_transforms_that_pytorch_no_longer_tells_of(monkeypatch, caplog):
    """The model goes on without its tables, and says what an upgrade took away."""
    plain, model = model_of("llama"), attached(model_of("llama"))
    monkeypatch.delattr(torch.autograd.forward_ad, "_current_level")
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=0, atol=0)
    assert used(model) == 0 and "_current_level" in caplog.text and "install torch==" in caplog.text


@torch.no_grad()
def test_autocast(caplog):
    plain, model = model_of("llama"), attached(model_of("llama"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(2):
            torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=0, atol=0)
    assert used(model) == 0 and len(warnings_of(caplog)) == 1


@torch.no_grad()
def test_a_compiled_graph_computes_and_follows_changes(caplog):
    plain, model = model_of("llama"), attached(model_of("llama"))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(IDS, use_cache=False).logits, plain(IDS, use_cache=False).logits)
        for each in (plain, model):
            q(each).weight.data += 0.1
    assert len(warnings_of(caplog)) == 1 and used(model) == 0


@torch.no_grad()
def test_copies_pickles_and_replicas_of_a_stale_model_stay_stale():
    model, plain = attached(model_of("llama")), model_of("llama")
    for each in (model, plain):
        q(each).weight.data += 0.1
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(other(IDS).logits, plain(IDS).logits, rtol=0, atol=0)
        assert used(other) == 0
    for each in (model, plain):
        replica = q(each)._replicate_for_data_parallel()
        replica.weight, replica.bias = nn.Parameter(torch.ones(32, 32)), None
        torch.testing.assert_close(replica(torch.ones(1, 32)), torch.full((1, 32), 32.0))


@torch.no_grad()
def test_detach_after_somebody_wrapped_the_forward():
    model, plain = attached(model_of("llama")), model_of("llama")
    for each in (model, plain):
        wrapped_forward(each)
    detach(model)
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=0, atol=0)


PLACES = ["model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"]


@torch.no_grad()
@pytest.mark.parametrize("offloaded", ["model.layers.0", "model.layers.1"])
def test_offloaded_layers(tmp_path, caplog, offloaded):
    source = checkpoint(tmp_path / "source")
    patch("first-layer", source, tmp_path / "target")
    places = {name: "disk" if name == offloaded else "cpu" for name in PLACES}
    plain, model = (
        AutoModelForCausalLM.from_pretrained(tmp_path / f, device_map=places, offload_folder=tmp_path / f"off_{f}")
        for f in ("source", "target")
    )
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)
    if offloaded == "model.layers.0":
        assert getattr(model, ATTRIBUTE, None) is None and len(warnings_of(caplog)) == 1
    else:
        assert used(model) == 1


@torch.no_grad()
def test_offloading_after_the_load(caplog):
    from accelerate import cpu_offload

    plain, model = model_of("llama"), attached(model_of("llama"))
    for each in (plain, model):
        cpu_offload(each, execution_device=torch.device("cpu"))
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=0, atol=0)
    assert used(model) == 0 and len(warnings_of(caplog)) == 1


class TestFolders:
    def test_a_second_quantisation_is_told_to_undo_first(self, tmp_path):
        patch("first-layer", checkpoint(tmp_path / "source"), tmp_path / "target")
        with pytest.raises(ValueError, match="hf-attn patch --undo"):
            AutoModelForCausalLM.from_pretrained(
                tmp_path / "target", quantization_config=BitsAndBytesConfig(load_in_8bit=True)
            )

    @torch.no_grad()
    def test_weights_or_settings_edited_in_the_folder(self, tmp_path, caplog):
        source, target = checkpoint(tmp_path / "source"), tmp_path / "target"
        patch("first-layer", source, target)
        model = AutoModelForCausalLM.from_pretrained(target, rms_norm_eps=0.5)
        plain = AutoModelForCausalLM.from_pretrained(source, rms_norm_eps=0.5)
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=0, atol=0)
        for folder in (source, target):
            weights = load_file(folder / "model.safetensors")
            weights["model.embed_tokens.weight"] *= 1.1
            save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        model, plain = (AutoModelForCausalLM.from_pretrained(folder) for folder in (target, source))
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=0, atol=0)
        assert used(model) == 0 and len(warnings_of(caplog)) == 2

    @torch.no_grad()
    def test_merged_saved_and_loaded_again(self, tmp_path):
        patch("first-layer", checkpoint(tmp_path / "source"), tmp_path / "target")
        plain, model = (AutoModelForCausalLM.from_pretrained(tmp_path / f) for f in ("source", "target"))
        for name, each in (("a", plain), ("b", model)):
            base = q(each)
            attention(each).q_proj = Lora(base)
            each(IDS)
            lora = attention(each).q_proj
            base.weight.data += lora.B.weight @ lora.A.weight
            attention(each).q_proj = base
            each(IDS)
            each.save_pretrained(tmp_path / name)
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=0, atol=0)
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "b")
        torch.testing.assert_close(again(IDS).logits, plain(IDS).logits, rtol=0, atol=0)
        assert getattr(again, ATTRIBUTE, None) is None

    @pytest.mark.parametrize("damage", ["old", "table"])
    def test_tables_without_proof_or_damaged_are_not_used(self, tmp_path, caplog, damage):
        patch("first-layer", checkpoint(tmp_path / "source"), tmp_path / "target")
        tables = load_file(tmp_path / "target" / TABLES)
        if damage == "old":
            tables = {k: v for k, v in tables.items() if k not in fingerprint.KEYS}
        else:
            tables["model.layers.0.self_attn.q_proj"][5, 3] += 1
        save_file(tables, tmp_path / "target" / TABLES)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
        assert getattr(model, ATTRIBUTE, None) is None and len(warnings_of(caplog)) == 1

    def test_the_recipe_loads_with_transformers_own_attention(self, tmp_path, monkeypatch):
        source = checkpoint(tmp_path / "source")
        patch("set-attention", source, "--in-place", "--attn", "star_attention")
        names, inner = [], AutoModelForCausalLM.from_pretrained

        def recording(*args, **kwargs):
            made = inner(*args, **kwargs)  # the model, and what the load says
            names.append(made[0].config._attn_implementation)
            return made

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", recording)
        patch("first-layer", source, tmp_path / "target")
        assert names == ["sdpa", "sdpa"]
        assert inner(tmp_path / "target").config._attn_implementation == "star_attention"


class TestFingerprint:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
    @pytest.mark.parametrize("width", [7, 8, 12])
    def test_every_single_change_swap_and_sign_is_seen(self, dtype, width):
        base = torch.randn(6, width, generator=torch.Generator().manual_seed(0)).to(dtype)
        for change in (
            lambda w: w.neg_(),
            lambda w: w[:, 1::2].neg_(),
            lambda w: w[1::2].neg_(),
            lambda w: w[:, :4].copy_(w[:, :4].flip(1)),
            lambda w: w.copy_(w.flip(0)),
            lambda w: w.copy_(w.roll(1, 1)),
            lambda w: w[2, 3].mul_(1.01),
            lambda w: w[0, :2].neg_(),
        ):
            other = base.clone()
            change(other)
            assert not torch.equal(fingerprint.checksum(other), fingerprint.checksum(base))
            assert not torch.equal(fingerprint.row_digests(other), fingerprint.row_digests(base))
        assert torch.equal(fingerprint.checksum(base.clone()), fingerprint.checksum(base))

    def test_digests_are_the_same_in_every_version(self):
        """Files carry them: the sum of lanes times splitmix-like factors, in Python's integers."""
        states = torch.tensor([[1.0, -2.5, 0.0, 3.25]])

        def signed(x):
            return (x + 2**63) % 2**64 - 2**63

        expected = 0
        for i, lane in enumerate(states.view(torch.int32)[0].tolist(), start=1):
            mixed = signed(i * -7046029254386353131)
            for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
                mixed = signed((mixed ^ (mixed >> shift)) * factor)
            expected += lane * (mixed ^ (mixed >> 31))
        assert fingerprint.row_digests(states).tolist() == [signed(expected)]


@pytest.mark.parametrize("place", ["top", "inner"])
def test_an_attention_from_a_hub_is_refused(tmp_path, place):
    source = checkpoint(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    named = {"attn_implementation": "somebody/kernel"}
    config |= named if place == "top" else {"text_config": named}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="somebody/kernel"):
        patch("first-layer", source, tmp_path / "target")
    assert not (tmp_path / "target").exists()
