"""Every exact plugin against the model's default backend: families, masks, caches, generation, training, compile."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_attn_plugins as hap
from tests.families import DECODERS, ENCODERS, OTHERS, VOCAB, build, padded_batch
from tests.older import OLDER, default_runs, needs_registry

EXACT = [plugin.name for plugin in hap.plugins() if plugin.exact]
ALL = list(DECODERS)
# Equal up to the order of float32 additions, on logits of a few units made sharp on purpose.
CLOSE = dict(atol=3e-4, rtol=1e-3)

# What makes a plugin do its own work on sequences as short as the ones below.
SHORT = {"cqs_attention": {"workers": 7, "min_length": 2}}

pytestmark = pytest.mark.parametrize("plugin", EXACT)


def use(model, plugin):
    return hap.use(model, plugin, **SHORT.get(plugin, {}))


@pytest.fixture(params=ALL)
def decoder(request):
    return build(request.param)


def logits(model, *args, **kwargs):
    with torch.no_grad():
        return model(*args, **kwargs).logits


def test_forward(plugin, decoder):
    ids, _ = padded_batch(33)
    expected = logits(decoder, ids)
    with use(decoder, plugin):
        torch.testing.assert_close(logits(decoder, ids), expected, **CLOSE)
    assert torch.equal(logits(decoder, ids), expected), "use() must leave the model as it was"


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(plugin, decoder, side):
    ids, mask = padded_batch(side=side)
    expected = logits(decoder, ids, attention_mask=mask)
    with use(decoder, plugin):
        got = logits(decoder, ids, attention_mask=mask)
    assert got.isfinite().all()
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)


GENERATE = {
    "greedy": dict(do_sample=False),
    "beam": dict(do_sample=False, num_beams=3),
    "sampling": dict(do_sample=True, top_k=20),
    "no cache": dict(do_sample=False, use_cache=False),
    "static cache": dict(do_sample=False, cache_implementation="static"),
    "prompt lookup": dict(do_sample=False, prompt_lookup_num_tokens=3),
    "chunked prefill": dict(do_sample=False, prefill_chunk_size=4),
}


def generate(model, ids, mask, **how):
    torch.manual_seed(0)
    return model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=9,
        min_new_tokens=9,
        output_logits=True,
        return_dict_in_generate=True,
        **how,
    )


@pytest.mark.parametrize("how", GENERATE)
def test_generate(plugin, decoder, how):
    ids, mask = padded_batch(11)
    if how in ("prompt lookup", "chunked prefill"):
        ids, mask = ids[:1], mask[:1]
        if type(decoder).__name__.startswith("Bamba"):
            pytest.skip("recurrent state cannot be rolled back or chunked")
    expected = default_runs(generate, decoder, ids, mask, **GENERATE[how])
    with use(decoder, plugin):
        got = generate(decoder, ids, mask, **GENERATE[how])
    assert torch.equal(got.sequences, expected.sequences)
    if how != "beam":
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), **CLOSE)


def test_assisted_decoding(plugin):
    model, assistant = build("llama"), build("llama", seed=1)
    ids, mask = padded_batch(11, batch=1)
    expected = generate(model, ids, mask, do_sample=False)
    default_runs(generate, model, ids, mask, do_sample=False, assistant_model=assistant)
    with use(model, plugin):
        got = generate(model, ids, mask, do_sample=False, assistant_model=assistant)
    assert torch.equal(got.sequences, expected.sequences)


def test_quantised_cache(plugin):
    model = build("llama")
    ids, mask = padded_batch(11)
    how = dict(do_sample=False, cache_implementation="quantized", cache_config={"backend": "fp8"})
    expected = default_runs(generate, model, ids, mask, **how)
    with use(model, plugin):
        assert torch.equal(generate(model, ids, mask, **how).sequences, expected.sequences)


@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_encoders(plugin, name, side):
    model = build(name)
    needs_registry(model, plugin)
    ids, mask = padded_batch(17, side=side)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).last_hidden_state
        with use(model, plugin):
            got = model(ids, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)


@pytest.mark.parametrize("how", ["greedy", "beam", "static cache"])
@pytest.mark.parametrize("name", ["t5", "whisper"])
def test_encoder_decoders(plugin, name, how):
    ids, mask = padded_batch()
    inputs = {
        "t5": dict(inputs=ids, attention_mask=mask),
        "whisper": dict(input_features=torch.randn(3, 8, 60)),
    }[name]
    model = build(name)
    needs_registry(model, plugin)
    expected = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **GENERATE[how])
    with use(model, plugin):
        got = model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, **GENERATE[how])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("name", OTHERS)
def test_other_forwards(plugin, name):
    model = build(name)
    needs_registry(model, plugin)
    ids, mask = padded_batch()
    inputs = {
        "t5": dict(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :7]),
        "whisper": dict(input_features=torch.randn(3, 8, 60), decoder_input_ids=ids[:, :7]),
        "vit": dict(pixel_values=torch.randn(2, 3, 24, 24)),
    }[name]
    with torch.no_grad():
        expected = model(**inputs)[0]
        with use(model, plugin):
            torch.testing.assert_close(model(**inputs)[0], expected, atol=2e-3, rtol=1e-3)


def gradients(model, ids, mask, **kwargs):
    model.zero_grad()
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100), **kwargs).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient checkpointing"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "mistral", "t5"])
def test_training_step(plugin, name, checkpointing):
    model = build(name)
    needs_registry(model, plugin)
    ids, mask = padded_batch(side="right")  # with left padding a fully masked row predicts the first token
    expected_loss, expected = gradients(model, ids, mask)
    with use(model, plugin):
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                module.attention_dropout = 0.0
            if isinstance(getattr(module, "dropout", None), float):
                module.dropout = 0.0
        loss, got = gradients(model, ids, mask)
    torch.testing.assert_close(loss, expected_loss, atol=1e-4, rtol=1e-4)
    assert set(got) == set(expected)
    scale = max(float(g.abs().max()) for g in expected.values())
    for key, gradient in expected.items():
        torch.testing.assert_close(
            got[key], gradient, atol=2e-3 * scale, rtol=1e-2, msg=lambda m, key=key: f"{key}: {m}"
        )


def test_attention_dropout_reaches_the_plugin(plugin):
    model = build("llama")
    ids, _ = padded_batch()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    with use(model, plugin):
        quiet = logits(model, ids)
        model.train()
        torch.manual_seed(0)
        first, second = logits(model, ids), logits(model, ids)
        torch.manual_seed(0)
        again = logits(model, ids)
    assert not torch.equal(first, second) and not torch.equal(first, quiet)
    assert torch.equal(first, again), "dropout must follow torch.manual_seed"


def test_packed_sequences(plugin):
    for name in ("llama", "mistral"):
        model = build(name)
        ids, _ = padded_batch(17, batch=2)
        ids = ids.clamp_min(5)
        position_ids = torch.cat([torch.arange(6), torch.arange(4), torch.arange(7)]).expand(2, -1)
        expected = logits(model, ids, position_ids=position_ids, use_cache=False)
        alone = logits(model, ids[:, 6:10], use_cache=False)
        with use(model, plugin):
            got = logits(model, ids, position_ids=position_ids, use_cache=False)
        torch.testing.assert_close(got, expected, **CLOSE)
        torch.testing.assert_close(got[:, 6:10], alone, **CLOSE)


def test_packed_sequences_by_boundaries(plugin):
    """The flattening collator's boundaries are honoured even where the default backend would let documents leak."""
    model = build("llama")
    ids, _ = padded_batch(17, batch=1)
    position_ids = torch.cat([torch.arange(6), torch.arange(11)]).unsqueeze(0)
    bounds = torch.tensor([0, 6, 17], dtype=torch.int32)
    expected = logits(model, ids[:, 6:])
    with use(model, plugin):
        got = logits(
            model,
            ids,
            position_ids=position_ids,
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=11,
            max_length_k=11,
        )
    torch.testing.assert_close(got[:, 6:], expected, **CLOSE)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_users_own_4d_mask(plugin, kind):
    model = build("llama")
    ids, _ = padded_batch()
    allowed = torch.ones(13, 13, dtype=torch.bool).tril()
    allowed[:, 2:5] = False
    allowed[torch.arange(13), torch.arange(13)] = True
    mask = allowed.expand(3, 1, 13, 13)
    if kind == "float":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    expected = logits(model, ids, attention_mask=mask)
    with use(model, plugin):
        torch.testing.assert_close(logits(model, ids, attention_mask=mask), expected, **CLOSE)


def test_autocast(plugin):
    model = build("llama")
    ids, mask = padded_batch()
    for cache in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            expected = logits(model, ids, attention_mask=mask, use_cache=cache)
            with use(model, plugin):
                got = logits(model, ids, attention_mask=mask, use_cache=cache)
        assert got.dtype == expected.dtype
        exact = logits(model, ids, attention_mask=mask)
        limit = 2 * (expected.float() - exact)[mask.bool()].abs().max()
        assert (got.float() - exact)[mask.bool()].abs().max() <= limit


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_compile_fullgraph(plugin, name):
    torch._dynamo.reset()
    model = build(name)
    ids, mask = padded_batch()
    expected = logits(model, ids, attention_mask=mask, use_cache=False)
    if OLDER:
        default = torch.compile(model, fullgraph=True, backend="aot_eager")
        default_runs(logits, default, ids, attention_mask=mask, use_cache=False)
        torch._dynamo.reset()
    with use(model, plugin):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        got = logits(compiled, ids, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(got[mask.bool()], expected[mask.bool()], **CLOSE)


def an_option(plugin):
    """Some option of a plugin, with a value that is not its default."""
    kind = hap.PLUGINS[plugin].options_type()
    for option in kind.names():
        for value in ("cpu_tiled", 3, 5, 0.5, True):
            with contextlib.suppress(ValueError, TypeError):
                if kind(**{option: value}).as_dict() == {option: value}:
                    return option, value
    raise AssertionError(f"no value for any of {kind.names()}: name one here")


def test_save_and_reload(plugin, tmp_path):
    model = build("llama")
    option, value = an_option(plugin)
    hap.configure(model, plugin, **{option: value})
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, attn_implementation=plugin)
    assert loaded.config.hf_attn_plugins == {plugin: {option: value}}
    assert loaded.config._attn_implementation == plugin
    ids, _ = padded_batch()
    torch.testing.assert_close(logits(loaded, ids), logits(model, ids), **CLOSE)
    assert copy.deepcopy(loaded).config.hf_attn_plugins == {plugin: {option: value}}


def test_long_prefill_takes_the_tiles(plugin):
    """Long enough for several tiles in bfloat16, against float32."""
    config = LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=VOCAB, max_position_embeddings=4096)  # fmt: skip
    torch.manual_seed(0)
    exact = LlamaForCausalLM(config).eval()
    low = copy.deepcopy(exact).to(torch.bfloat16)
    ids = torch.randint(5, VOCAB, (2, 1500))
    mask = torch.ones_like(ids)
    mask[1, :700] = 0
    reference = logits(exact, ids, attention_mask=mask)
    plain = logits(low, ids, attention_mask=mask).float()
    with use(low, plugin):
        got = logits(low, ids, attention_mask=mask).float()
    real = mask.bool()
    assert (got - reference)[real].abs().max() <= 2 * (plain - reference)[real].abs().max()
