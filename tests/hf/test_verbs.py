"""use, configure, check, compare, plugins: what they change, what they restore, what they refuse."""

from __future__ import annotations

import inspect
import pickle
import sys

import pytest
import torch
import transformers as hf

import hf_attn_plugins as hap
from hf_attn_plugins.hf.configure import configs_of
from tests.families import DECODERS, ENCODERS, OTHERS, SMALL, build, padded_batch
from tests.older import OLDER, needs_registry


def state(model):
    return [(c._attn_implementation, getattr(c, "hf_attn_plugins", None)) for c in configs_of(model)]


def llava():
    vision = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=24, patch_size=4
    )
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision), text_config=hf.LlamaConfig(**SMALL), image_token_index=96
    )
    return hf.LlavaForConditionalGeneration(config).eval()


def test_plugins_is_the_table():
    assert [p.name for p in hap.plugins()] == list(hap.PLUGINS)
    for name in hap.PLUGINS:
        assert not any(word in name for word in ("flash", "sdpa", "flex_attention", "/", "paged|"))


def test_registering_twice_and_unregistering():
    from transformers import AttentionInterface, AttentionMaskInterface

    hap.register()
    assert set(hap.PLUGINS) <= set(AttentionInterface._global_mapping) & set(AttentionMaskInterface._global_mapping)
    hap.unregister()
    try:
        assert not set(hap.PLUGINS) & set(AttentionInterface._global_mapping)
        assert not set(hap.PLUGINS) & set(AttentionMaskInterface._global_mapping)
        with pytest.raises(ValueError):
            hf.LlamaForCausalLM._from_config(hf.LlamaConfig(**SMALL), attn_implementation="tiled_attention")
    finally:
        hap.register()
    hf.LlamaForCausalLM._from_config(hf.LlamaConfig(**SMALL), attn_implementation="tiled_attention")


@pytest.mark.parametrize("make", [lambda: build("llama"), llava], ids=["llama", "llava"])
def test_use_restores_names_and_options_even_after_an_error(make):
    model = make()
    hap.configure(model, "tiled_attention", kernel="aten")
    before = state(model)
    with pytest.raises(RuntimeError, match="stop"), hap.use(model, "tiled_attention", kernel="cpu_tiled"):
        assert model.config.hf_attn_plugins == {"tiled_attention": {"kernel": "cpu_tiled"}}
        assert all(implementation == "tiled_attention" for implementation, _ in state(model))
        raise RuntimeError("stop")
    assert state(model) == before


def test_use_restores_a_mixture():
    model = llava()
    model.set_attn_implementation({"text_config": "eager", "vision_config": "sdpa"})
    before = state(model)
    with hap.use(model, "tiled_attention"):
        pass
    assert state(model) == before and len({implementation for implementation, _ in before}) > 1


def test_use_takes_stock_backends_too():
    model = build("llama")
    with hap.use(model, "eager"):
        assert model.config._attn_implementation == "eager"
    with pytest.raises(ValueError, match="no plugin"), hap.use(model, "eager", kernel="aten"):
        pass


def test_configure_is_all_or_nothing():
    model = build("llama")
    for options, message in (({"kernl": "aten"}, "kernel"), ({"kernel": "magic"}, "magic")):
        with pytest.raises(ValueError, match=message):
            hap.configure(model, "tiled_attention", **options)
    with pytest.raises(ValueError, match="choose one of"):
        hap.configure(model, "tilled_attention")
    assert getattr(model.config, "hf_attn_plugins", None) is None
    hap.configure(model, "tiled_attention", kernel="aten")
    hap.configure(model, "tiled_attention", kernel=None)
    assert model.config.hf_attn_plugins == {"tiled_attention": {}}
    assert pickle.loads(pickle.dumps(model.config)).hf_attn_plugins == {"tiled_attention": {}}


def test_options_take_effect():
    model = build("gemma2")
    ids, _ = padded_batch()
    with pytest.raises(NotImplementedError, match="softcap"), hap.use(model, "tiled_attention", kernel="aten"):
        model(ids)


@pytest.mark.parametrize("name", [*DECODERS, *ENCODERS, *OTHERS])
@pytest.mark.parametrize("plugin", list(hap.PLUGINS))
def test_check_accepts_what_works(name, plugin):
    model = build(name)
    needs_registry(model, plugin)
    report = hap.check(model, plugin)
    assert report.ok, str(report)
    assert sum(v.count for v in report.verdicts) > 0 and plugin in str(report)


def never_asking():
    bloom = hf.BloomForCausalLM(hf.BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4))
    codegen = hf.CodeGenForCausalLM(
        hf.CodeGenConfig(vocab_size=97, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_ctx=64, n_positions=64)
    )
    mpt = hf.MptForCausalLM(hf.MptConfig(vocab_size=97, d_model=32, n_layers=2, n_heads=4))
    xglm = hf.XGLMForCausalLM(
        hf.XGLMConfig(
            vocab_size=97, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=64
        )
    )
    return {"bloom": bloom, "codegen": codegen, "mpt": mpt, "xglm": xglm}  # fmt: skip


@pytest.mark.parametrize("name", ["bloom", "codegen", "mpt", "xglm"])
def test_families_that_never_ask_the_registry_are_refused(name):
    model = never_asking()[name]
    if "ALL_ATTENTION_FUNCTIONS" in inspect.getsource(sys.modules[type(model).__module__]):
        pytest.skip(f"{name} asks the registry in this version of Transformers")
    report = hap.check(model, "tiled_attention")
    assert not report.ok
    with pytest.raises(ValueError, match="cannot be used with"), hap.use(model, "tiled_attention"):
        pass
    # Loaded by name, without check(): the mask function refuses before logits can be silently wrong.
    inputs = dict(input_ids=torch.randint(5, 97, (2, 9)), attention_mask=torch.ones(2, 9, dtype=torch.long))
    model.eval()
    default = model(**inputs).logits
    model.config._attn_implementation_internal = "tiled_attention"
    if OLDER and "masking_utils" not in inspect.getsource(sys.modules[type(model).__module__]):
        # This version's model builds its mask itself: our mask function is not asked, and the name changes nothing.
        torch.testing.assert_close(model(**inputs).logits, default)
        return
    with pytest.raises(ValueError, match="never ask"):
        model(**inputs)


def call(model, **extra):
    """One attention call as a model would make it, with extra keywords."""
    from hf_attn_plugins.hf.calls.interface import attention_function
    from hf_attn_plugins.plugins import plugin

    forward = attention_function(plugin("tiled_attention"))
    query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    return forward(model.model.layers[0].self_attn, query, key, key, None, scaling=0.3, **extra)


@pytest.mark.parametrize(
    "extra",
    [
        {"indices": torch.zeros(1, 5, 2, dtype=torch.long)},
        {"block_indices": torch.zeros(1, 5, 2, dtype=torch.long)},
        {"cache": object()},  # no cache of a model's own: a paged one
        {"sinks": torch.zeros(1, 4, 3, 1)},
        {"alibi_slopes": torch.zeros(4)},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_semantics_it_cannot_honour_are_refused_by_name(extra):
    with pytest.raises(NotImplementedError, match=f"`{next(iter(extra))}`.*attn_implementation="):
        call(build("llama"), **extra)


def test_harmless_keywords_pass():
    out, weights = call(
        build("llama"),
        position_ids=torch.arange(5),
        use_cache=True,
        indices=None,
        unknown_flag=True,
        cache=hf.DynamicCache(),
    )
    assert out.shape == (1, 5, 4, 8) and out.is_contiguous() and weights is None


def test_masks_of_the_wrong_shape_are_refused():
    model = build("llama")
    from hf_attn_plugins.core.mask import Mask
    from hf_attn_plugins.hf.calls.interface import attention_function
    from hf_attn_plugins.hf.masks.structured_mask import Structure, StructuredMask
    from hf_attn_plugins.plugins import plugin

    forward = attention_function(plugin("tiled_attention"))

    x = torch.randn(1, 4, 5, 8)
    with pytest.raises(ValueError, match="4-d"):
        forward(model, x, x, x, torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="behind the mask's back"):
        forward(model, x, x, x, StructuredMask(Structure(Mask(causal=True), (1, 1, 5, 6))))


def test_cutting_a_structured_mask():
    from hf_attn_plugins.core.mask import Mask
    from hf_attn_plugins.hf.masks.structured_mask import Structure, StructuredMask

    mask = StructuredMask(Structure(Mask(causal=True), (1, 1, 6, 9)))
    last = mask[:, :, -2:]
    assert last.shape == (1, 1, 2, 9) and last.structure.mask.start(2, 9) == 3 + 4
    cut = mask[..., :3]  # any other cut is made of numbers
    assert type(cut) is torch.Tensor and cut.tolist() == [[[[k <= q + 3 for k in range(3)] for q in range(6)]]]
    assert mask.to("cpu").structure.mask.causal and "StructuredMask" in repr(mask)


def test_compare_an_exact_plugin():
    model = build("llama")
    ids = torch.randint(5, 97, (2, 300))
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    before = state(model)
    report = hap.compare(model, ids, "tiled_attention", attention_mask=mask, repeats=1, kernel="cpu_tiled")
    assert report.top1 > 0.999 and report.kl_max < 1e-5 and abs(report.perplexity_ratio - 1) < 1e-4
    assert report.plugin.options == {"kernel": "cpu_tiled"} and report.baseline.name == "sdpa"
    assert report.baseline.seconds > 0 and report.plugin.tokens_per_second > 0
    assert state(model) == before and "forward" not in vars(model.model)


def test_compare_measures_what_it_says():
    """Against a model with other predictions, the figures equal those computed from whole logits."""
    model = build("gemma2")  # with a final softcap on the logits, which chunked logits must not lose
    ids = torch.randint(5, 97, (1, 300))
    with torch.no_grad(), hap.use(model, "tiled_attention"):
        p = model(ids).logits.double().log_softmax(-1)
        with hap.use(model, "eager"):
            q = model(ids).logits.double().log_softmax(-1)
    from hf_attn_plugins.hf.compare import _Statistics

    report = hap.compare(model, ids, "tiled_attention", baseline="eager", repeats=1)
    nll = -q[:, :-1].gather(-1, ids[:, 1:, None]).mean()
    assert report.baseline.perplexity == pytest.approx(float(nll.exp()), rel=1e-6)
    other = torch.randn(1, 300, 97)
    statistics = _Statistics()
    for start in range(0, 300, 128):
        end = min(300, start + 128)
        statistics.add(p[:, start:end], other[:, start:end], ids, None, start, end)
    o = other.double().log_softmax(-1)
    kl = (p.exp() * (p - o)).sum(-1)
    figures = statistics.figures()
    assert figures["kl_mean"] == pytest.approx(float(kl.mean())) and figures["kl_max"] == pytest.approx(float(kl.max()))
    assert figures["top1"] == pytest.approx(float((p.argmax(-1) == o.argmax(-1)).double().mean()))
    assert figures["rms_probability_difference"] == pytest.approx(float((p.exp() - o.exp()).square().mean().sqrt()))


def test_compare_refuses_bad_input():
    model = build("llama")
    with pytest.raises(ValueError, match="at least 2"):
        hap.compare(model, torch.zeros(1, 1, dtype=torch.long), "tiled_attention")
    with pytest.raises(ValueError, match="no option"):
        hap.compare(model, torch.ones(1, 8, dtype=torch.long), "tiled_attention", blocks=3)
    with pytest.raises(ValueError, match="head"):
        hap.compare(build("bert"), torch.ones(1, 8, dtype=torch.long), "tiled_attention")


@pytest.mark.parametrize("name", hap.PLUGINS)
@pytest.mark.parametrize("keyword", ["indices", "block_indices", "cache", "a_tensor_of_a_later_release"])
def test_what_would_change_the_result_is_refused_and_not_dropped(name, keyword):
    from hf_attn_plugins.hf.calls.interface import attention_function

    forward = attention_function(hap.PLUGINS[name])
    module = torch.nn.Module()
    module.is_causal = True
    query = torch.randn(1, 2, 5, 8)
    out, _ = forward(module, query, query, query, **{keyword: None})
    assert out.shape == (1, 5, 2, 8)
    with pytest.raises(NotImplementedError, match=f"{name} does not .*`{keyword}`"):
        forward(module, query, query, query, **{keyword: torch.zeros(1)})
