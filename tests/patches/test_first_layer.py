"""`hf-attn patch first-layer`: equal logits and tokens, plain loading, honest numbers, and every refusal."""

from __future__ import annotations

import argparse
import copy
import io

import pytest
import torch
from hf_attn_plugins.patches import command
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    MambaConfig,
    Olmo2Config,
    Phi3Config,
    PhiConfig,
)

from hf_attn_plugins import register
from hf_attn_plugins.checkpoint import first_layer
from hf_attn_plugins.checkpoint import verify as verify_module
from hf_attn_plugins.checkpoint.attach import ATTRIBUTE, attach, detach
from hf_attn_plugins.checkpoint.loader import METHOD, TABLES
from hf_attn_plugins.testing import assert_close_to_reference
from tests import forks

from .families import FAMILIES, SIZES, checkpoint, fingerprint, model_of

register()
IDS = torch.randint(3, 97, (2, 20), generator=torch.Generator().manual_seed(3))


def patch(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(a) for a in arguments]))


def attached(model):
    """The model with tables of its own."""
    places = first_layer.audit(model).require()
    attach(model, places, first_layer.build(model, places))
    return model


def count_projections(model, call):
    """How often the first layer's projections were computed, rather than looked up, during a call."""
    layer, counted, linear = getattr(model, ATTRIBUTE), [], torch.nn.functional.linear
    weights = [projection.weight for projection in layer.projections]

    def counting(x, weight, bias=None):
        counted.extend(1 for w in weights if w is weight)
        return linear(x, weight, bias)

    torch.nn.functional.linear = counting
    try:
        call()
    finally:
        torch.nn.functional.linear = linear
    return len(counted)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_patched_folder_loads_and_gives_the_same(tmp_path, capsys, family, sharded):
    source, target = checkpoint(tmp_path / "source", family, sharded), tmp_path / "target"
    before = fingerprint(source)
    patch("first-layer", source, target)
    printed = capsys.readouterr().out
    assert "verified on 128 random tokens" in printed and "MFLOP a token" in printed
    assert fingerprint(source) == before
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, target))
    assert getattr(new, ATTRIBUTE, None) is not None
    with torch.no_grad():
        ref, low, out = (model(IDS).logits for model in (copy.deepcopy(old).double(), old, new))
        assert_close_to_reference(out, low, ref)
        assert count_projections(new, lambda: new(IDS)) == 0
    settings = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(old.generate(IDS, **settings), new.generate(IDS, **settings))
    assert not getattr(new, "is_quantized", False) and getattr(new.config, "quantization_config", None) is None
    patch("--undo", target)
    assert fingerprint(target) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_error_rule(tmp_path, dtype):
    source, target = checkpoint(tmp_path / "source", dtype=dtype), tmp_path / "target"
    patch("first-layer", source, target)
    old, new = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (source, target))
    assert new.dtype == dtype and getattr(new, ATTRIBUTE, None) is not None
    with torch.no_grad():
        assert_close_to_reference(new(IDS).logits, old(IDS).logits, copy.deepcopy(old).float()(IDS).logits)


def test_plain_loading_in_a_fresh_process(tmp_path):
    source, target = checkpoint(tmp_path / "source"), tmp_path / "target"
    patch("first-layer", source, target)
    code = (
        "import hf_attn_plugins\n"
        "from transformers import AutoModelForCausalLM\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as known\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(target)!r}); print(hasattr(m, {ATTRIBUTE!r}))\n"
        f"del known[{METHOD!r}]  # as if this package were not there\n"
        f"m = AutoModelForCausalLM.from_pretrained({str(target)!r}); print(hasattr(m, {ATTRIBUTE!r}))\n"
    )
    done = forks.run(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "False"]
    assert METHOD in done.stderr  # Transformers' own warning of a method it does not know


def test_the_bare_model_takes_the_tables_too(tmp_path):
    source, target = checkpoint(tmp_path / "source"), tmp_path / "target"
    patch("first-layer", source, target)
    old, new = (AutoModel.from_pretrained(folder) for folder in (source, target))
    with torch.no_grad():
        assert count_projections(new, lambda: new(IDS)) == 0
        torch.testing.assert_close(new(IDS).last_hidden_state, old(IDS).last_hidden_state, rtol=1e-4, atol=1e-4)


def test_another_dtype_loads_without_tables(tmp_path, caplog):
    source, target = checkpoint(tmp_path / "source"), tmp_path / "target"
    patch("first-layer", source, target)
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16)
    assert getattr(model, ATTRIBUTE, None) is None
    assert "first-layer tables not used" in caplog.text


@pytest.mark.parametrize("name", ["self_attn.q_proj.weight", "input_layernorm.weight"])
def test_weights_that_the_checkpoint_lacks_are_named(tmp_path, name):
    source = checkpoint(tmp_path / "source")
    for file in source.glob("*.safetensors"):
        tensors = load_file(file)
        tensors.pop(f"model.layers.0.{name}", None)
        save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=f"the weights hold no model.layers.0.{name}"):
        patch("first-layer", source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_saving_a_loaded_model_writes_the_plain_one(tmp_path):
    source, target = checkpoint(tmp_path / "source"), tmp_path / "target"
    patch("first-layer", source, target)
    AutoModelForCausalLM.from_pretrained(target).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / TABLES).exists()
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, tmp_path / "saved"))
    for name, parameter in old.state_dict().items():
        assert torch.equal(parameter, new.state_dict()[name])


class TestAttached:
    @torch.no_grad()
    def test_padding_caches_and_static_caches(self):
        plain, model = model_of("qwen3"), attached(model_of("qwen3"))
        mask = torch.ones_like(IDS)
        mask[0, :5] = 0
        for cache in (None, "static"):
            settings = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "attention_mask": mask}
            assert torch.equal(plain.generate(IDS, **settings), model.generate(IDS, **settings))

    @torch.no_grad()
    def test_inputs_embeds_are_computed(self):
        plain, model = model_of("llama"), attached(model_of("llama"))
        model(IDS)
        embeds = torch.randn(2, 20, 32)
        assert count_projections(model, lambda: model(inputs_embeds=embeds)) == 3
        torch.testing.assert_close(model(inputs_embeds=embeds).logits, plain(inputs_embeds=embeds).logits)

    def test_training_computes_and_has_all_gradients(self):
        model, plain = attached(model_of("llama")), model_of("llama")
        for each in (model, plain):
            each(IDS, labels=IDS).loss.backward()
        for (name, a), (_, b) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, msg=name)

    @torch.no_grad()
    def test_a_changed_weight_stops_the_tables(self, caplog):
        for path in ("embed_tokens", "layers.0.self_attn.k_proj", "layers.0.input_layernorm"):
            model, plain = attached(model_of("llama")), model_of("llama")
            for each in (model, plain):
                each.model.get_submodule(path).weight.mul_(1.5)
            torch.testing.assert_close(model(IDS).logits, plain(IDS).logits)
            assert "weights have changed" in caplog.text
            caplog.clear()

    @torch.no_grad()
    def test_wrong_tables_change_the_logits(self):
        model, plain = attached(model_of("llama")), model_of("llama")
        for projection in getattr(model, ATTRIBUTE).projections:
            projection.first_layer_table.mul_(1.5)
        assert (model(IDS).logits - plain(IDS).logits).abs().max() > 0.1

    @torch.no_grad()
    def test_an_error_in_the_middle_leaves_no_tokens_behind(self):
        model = attached(model_of("llama"))
        hook = model.model.layers[1].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
        with pytest.raises(RuntimeError, match="stop"):
            model(IDS)
        hook.remove()
        assert getattr(model, ATTRIBUTE).tokens.now is None

    @torch.no_grad()
    def test_detach_restores_the_model(self):
        model, plain = attached(model_of("llama")), model_of("llama")
        with pytest.raises(ValueError, match="attached already"):
            attach(model, getattr(model, ATTRIBUTE), {})
        detach(model)
        detach(model)
        assert torch.equal(model(IDS).logits, plain(IDS).logits)
        assert not model._forward_pre_hooks and not model.model._forward_pre_hooks
        assert [n for n, _ in model.named_buffers()] == [n for n, _ in plain.named_buffers()]

    @torch.no_grad()
    def test_copies_and_pickles_keep_their_own_tables(self):
        model = attached(model_of("llama"))
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        wanted = model(IDS).logits
        for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
            assert count_projections(other, lambda other=other: other(IDS)) == 0
            assert torch.equal(other(IDS).logits, wanted)
            for projection in getattr(other, ATTRIBUTE).projections:
                projection.first_layer_table.zero_()
            assert torch.equal(model(IDS).logits, wanted) and not torch.equal(other(IDS).logits, wanted)

    @torch.no_grad()
    def test_compiled_it_gives_the_same(self):
        model = attached(model_of("llama"))
        compiled = torch.compile(model, backend="eager")
        torch.testing.assert_close(compiled(IDS).logits, model(IDS).logits)

    def test_the_state_is_that_of_the_plain_model(self):
        assert attached(model_of("llama")).state_dict().keys() == model_of("llama").state_dict().keys()


def random_model(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


class TestAudit:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_what_it_says_of_the_families(self, family):
        audit = first_layer.audit(model_of(family))
        text = "\n".join(audit.reasons)
        assert audit.refusal is None and audit.places.norm == "model.layers.0.input_layernorm"
        assert [p.rpartition(".")[2] for p in audit.places.projections] == ["q_proj", "k_proj", "v_proj"]
        assert ("biases of q_proj, k_proj, v_proj are included" in text) == (family == "qwen2")
        assert ("k_norm, q_norm after the projections" in text) == (family == "qwen3")
        assert ("embedding scaled by 5.657" in text) == (family == "gemma")
        assert "layers 1 to 1: refused" in text

    @pytest.mark.parametrize(
        ("config", "norm", "projections"),
        [
            (Phi3Config(**SIZES, original_max_position_embeddings=128), "model.layers.0.input_layernorm", ["qkv_proj"]),
            # The norm feeds the MLP as well, which reads the true states.
            (
                PhiConfig(**{**SIZES, "num_key_value_heads": 4}),
                "model.layers.0.input_layernorm",
                ["q_proj", "k_proj", "v_proj"],
            ),
            # No norm before attention at all.
            (Olmo2Config(**SIZES), None, ["q_proj", "k_proj", "v_proj"]),
            (Gemma3TextConfig(**SIZES), "model.layers.0.input_layernorm", ["q_proj", "k_proj", "v_proj"]),
        ],
    )
    @torch.no_grad()
    def test_other_structures(self, config, norm, projections):
        model, plain = random_model(config), random_model(config)
        places = first_layer.audit(model).require()
        assert places.norm == norm
        assert [p.rpartition(".")[2] for p in places.projections] == projections
        attached(model)
        assert count_projections(model, lambda: model(IDS)) == 0
        torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            (GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64), "wpe is added"),
            (MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4), "no plain nn.Linear"),
        ],
    )
    def test_what_is_not_exact_is_refused(self, config, reason):
        audit = first_layer.audit(random_model(config))
        assert audit.places is None and reason in audit.refusal
        with pytest.raises(ValueError, match="would not be exact"):
            audit.require()

    def test_adapters_and_quantized_models_are_refused(self):
        model = model_of("llama")
        model.model.layers[0].self_attn.q_proj.lora_A = torch.nn.Linear(2, 2)
        assert "LoRA" in first_layer.audit(model).refusal
        model = model_of("llama")
        model.config.quantization_config = {"quant_method": "gptq"}
        assert "quantized" in first_layer.audit(model).refusal
        assert "attached already" in first_layer.audit(attached(model_of("llama"))).refusal

    def test_context_that_enters_before_the_first_layer_is_refused(self):
        model = model_of("llama")
        model.model.layers[0].input_layernorm.register_forward_hook(lambda m, a, out: out + out.cumsum(1))
        assert "differs with position or context" in first_layer.audit(model).refusal

    def test_weights_that_are_not_finite_and_models_without_layers_are_refused(self):
        model = model_of("llama")
        model.model.layers[0].input_layernorm.weight.data[2] = torch.nan
        assert "not finite" in first_layer.audit(model).refusal
        model = model_of("llama")
        model.config.num_hidden_layers = 0
        model.model.layers = torch.nn.ModuleList()
        assert "no stack of layers" in first_layer.audit(model).refusal

    def test_it_leaves_no_hooks(self):
        model = model_of("llama")
        first_layer.audit(model)
        assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


class TestGain:
    def test_numbers_are_those_of_the_matrices(self):
        model = model_of("llama")
        gain = first_layer.gain(model, first_layer.audit(model).require())
        columns = 32 + 16 + 16
        assert gain.bytes_added == 97 * columns * 4 and gain.flops_saved == 2 * 32 * columns
        assert gain.bytes_of_model == sum(p.numel() * 4 for p in model.parameters())
        per_layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
        assert gain.flops_of_model == 2 * (2 * per_layer + 32 * 97)
        assert "hardly pays" in gain.lines()[1]

    def test_it_pays_for_bytes_in_a_wide_model(self):
        model = model_of("llama", vocab_size=64, hidden_size=128)
        assert "it pays" in first_layer.gain(model, first_layer.audit(model).require()).lines()[1]


class TestRefusals:
    def refused(self, tmp_path, source, message=None, error=ValueError):
        before = fingerprint(tmp_path)
        for arguments in ([tmp_path / "target"], ["--in-place"]):
            with pytest.raises(error, match=message):
                patch("first-layer", source, *arguments)
            assert fingerprint(tmp_path) == before

    def test_a_failed_verification(self, tmp_path, monkeypatch):
        source = checkpoint(tmp_path / "source")
        inner = first_layer.build
        monkeypatch.setattr(first_layer, "build", lambda *a: {k: v + 0.1 for k, v in inner(*a).items()})
        self.refused(tmp_path, source, "verification failed")

    def test_an_inexact_model(self, tmp_path):
        source = tmp_path / "source"
        random_model(GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4)).save_pretrained(source)
        self.refused(tmp_path, source, "wpe is added")

    def test_a_second_time(self, tmp_path):
        source = checkpoint(tmp_path / "source")
        patch("first-layer", source, "--in-place")
        self.refused(tmp_path, source, "already has a quantization_config")

    def test_an_interruption_during_verification(self, tmp_path, monkeypatch):
        def interrupt(*_):
            raise KeyboardInterrupt

        source = checkpoint(tmp_path / "source")
        monkeypatch.setattr(verify_module, "compare", interrupt)
        self.refused(tmp_path, source, error=KeyboardInterrupt)

    def test_a_missing_text(self, tmp_path):
        source = checkpoint(tmp_path / "source")
        with pytest.raises(FileNotFoundError, match=r"nowhere\.txt"):
            patch("first-layer", source, tmp_path / "target", "--text", "nowhere.txt")


@torch.no_grad()
def test_a_byte_level_model_pays(tmp_path, capsys):
    """A vocabulary smaller than the hidden size: the tables are smaller than the matrices they replace."""
    source, target = tmp_path / "source", tmp_path / "target"
    model_of("llama", vocab_size=128, hidden_size=192, num_hidden_layers=1).save_pretrained(source)
    patch("first-layer", source, target)
    assert "it pays" in capsys.readouterr().out
    old, new = (AutoModelForCausalLM.from_pretrained(folder) for folder in (source, target))
    torch.testing.assert_close(new(IDS).logits, old(IDS).logits, rtol=1e-4, atol=1e-3)
    flops = []
    for model in (old, new):
        with FlopCounterMode(display=False) as counter:
            model(IDS[:1, :10])
        flops.append(counter.get_total_flops())
    saved = first_layer.gain(old, first_layer.audit(old).require()).flops_saved
    assert flops[0] - flops[1] == 10 * saved


def test_in_place_and_back(tmp_path):
    source = checkpoint(tmp_path / "source")
    before = fingerprint(source)
    patch("first-layer", source, "--in-place")
    assert hasattr(AutoModelForCausalLM.from_pretrained(source), ATTRIBUTE)
    patch("--undo", source)
    assert fingerprint(source) == before
