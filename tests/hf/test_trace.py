"""What is promised is what runs: trace counts it, check predicts it, compiled and exported graphs do the same."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import hf_attn_plugins as hap
from hf_attn_plugins.star.plan import Plan
from tests.families import SMALL, build, padded_batch

STAR = {"block_size": 8, "anchor_size": 4, "query_size": 4}
IDS = torch.randint(5, 97, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def llama():
    torch._dynamo.reset()
    return build("llama")


@pytest.fixture
def one_layer(llama):
    """For graphs: a second layer takes as long to trace as the first, and adds no kind of operation."""
    llama.model.layers = llama.model.layers[:1]
    llama.config.num_hidden_layers = 1
    return llama


def test_counts_what_ran_per_layer(llama):
    layers = llama.config.num_hidden_layers
    with hap.trace(llama) as seen, hap.use(llama, "star_attention", **STAR), torch.no_grad():
        llama.generate(IDS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert seen.methods == {"star": layers, "decode": 2 * layers}
    plan = Plan(24, 8, 4, 4)
    assert seen.share == plan.attended_pairs() / plan.causal_pairs()
    assert set(seen.layers) == set(range(layers)) and seen.layers[0] == {"star": 1, "decode": 2}
    assert "star: blocks 3, block_size 8, anchor_size 4, query_size 4" in str(seen)
    assert all(call.mask == ("causal",) for call in seen.calls)


@pytest.mark.parametrize(
    ("name", "options", "tokens", "method", "reason"),
    [
        ("star_attention", {}, 24, "dense", "24 tokens, below 2048"),
        ("star_attention", {"block_size": 32}, 24, "dense", "24 tokens are one block of 32"),
        ("cqs_attention", {}, 24, "tiled", "24 tokens, below min_length 1024"),
        ("cqs_attention", {"workers": 7, "min_length": 1}, 4, "tiled", "4 tokens, fewer than 7 workers"),
        ("cqs_attention", {"workers": 3, "min_length": 1}, 24, "cqs", ""),
        ("tiled_attention", {}, 24, "tiled", ""),
    ],
)
def test_says_why_a_plan_did_not_run_and_check_predicts_it(llama, name, options, tokens, method, reason):
    with hap.trace(llama) as seen, hap.use(llama, name, **options), torch.no_grad():
        llama(IDS[:, :tokens])
        predicted = hap.check(llama, name, length=tokens)
    assert {call.method for call in seen.calls} == {method} and {call.reason for call in seen.calls} == {reason}
    assert predicted.methods == seen.methods
    assert [call.text() for call in predicted.calls] == [call.text() for call in seen.calls]


def test_a_trace_ends_and_leaves_nothing(llama):
    before = {name: set(vars(module)) for name, module in llama.named_modules()}
    with hap.use(llama, "tiled_attention"), torch.no_grad():
        with hap.trace(llama) as outer:
            llama(IDS)
            with hap.trace(llama) as inner:
                llama(IDS)
            llama(IDS)
        llama(IDS)
    assert len(inner.calls) == llama.config.num_hidden_layers and len(outer.calls) == 2 * len(inner.calls)
    assert {name: set(vars(module)) for name, module in llama.named_modules()} == before


def test_padded_rows_count_their_own_prompts(llama):
    ids, mask = padded_batch()
    lengths = mask.sum(1).tolist()
    sizes = {"block_size": 4, "anchor_size": 2, "query_size": 2}
    with hap.trace(llama) as seen, hap.use(llama, "star_attention", **sizes), torch.no_grad():
        llama(ids, attention_mask=mask)
    plans = [Plan(n, 4, 2, 2) for n in lengths]
    assert seen.share == sum(p.attended_pairs() for p in plans) / sum(p.causal_pairs() for p in plans)


SITUATIONS = {
    "with a cache": {},
    "without a cache": {"use_cache": False},
    "a mask of ones": {"attention_mask": torch.ones_like(IDS)},
    "labels": {"labels": IDS},
    "left padding": {"attention_mask": (torch.arange(24) >= torch.tensor([[3], [0]])).long()},
    "packed": {"position_ids": torch.cat([torch.arange(15), torch.arange(9)])[None].expand(2, -1), "use_cache": False},
}


@pytest.mark.parametrize("how", SITUATIONS)
@pytest.mark.parametrize(
    ("name", "options"), [("star_attention", STAR), ("cqs_attention", {"workers": 3, "min_length": 1})]
)
def test_compiled_runs_what_eager_runs(one_layer, name, options, how):
    with hap.trace(one_layer) as seen, hap.use(one_layer, name, **options), torch.no_grad():
        eager = one_layer(IDS, **SITUATIONS[how]).logits
        expected = [call.text() for call in seen.calls]
        compiled = torch.compile(one_layer, backend="aot_eager", fullgraph=True)
        for _ in range(2):
            before = len(seen.calls)
            torch.testing.assert_close(compiled(IDS, **SITUATIONS[how]).logits, eager, atol=1e-5, rtol=1e-5)
            assert [call.text() for call in seen.calls[before:]] == expected
    short = name.removesuffix("_attention")
    assert expected[0].startswith(short), "the plan itself must have run, or the test says nothing"


def test_compiled_windows_are_recognised():
    torch._dynamo.reset()
    model = build("mistral")  # every layer has a window
    with hap.trace(model) as seen, hap.use(model, "star_attention", **STAR), torch.no_grad():
        eager = model(IDS).logits
        for kwargs in ({}, {"use_cache": False}):
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            torch.testing.assert_close(compiled(IDS, **kwargs).logits, eager, atol=1e-5, rtol=1e-5)
    assert set(seen.methods) == {"star"} and all("window" in " ".join(call.mask) for call in seen.calls)


def test_compiled_gradients_are_those_of_eager(llama):
    grads = []
    with hap.use(llama, "star_attention", **STAR):
        for run in (llama, torch.compile(llama, backend="aot_eager")):
            llama.zero_grad()
            run(IDS, labels=IDS).loss.backward()
            grads.append({name: p.grad.clone() for name, p in llama.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-6, rtol=1e-4, msg=name)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, use_cache=False).logits


@pytest.mark.parametrize(
    ("name", "options"),
    [("tiled_attention", {}), ("star_attention", STAR), ("cqs_attention", {"workers": 3, "min_length": 1})],
)
def test_export_for_any_length(one_layer, name, options):
    with hap.use(one_layer, name, **options), torch.no_grad():
        dynamic = {"ids": {1: torch.export.Dim("length", min=2, max=200)}}
        program = torch.export.export(Logits(one_layer), (IDS,), dynamic_shapes=dynamic).module()
        for length in (24, 17, 40):
            ids = torch.randint(5, 97, (2, length), generator=torch.Generator().manual_seed(length))
            torch.testing.assert_close(program(ids), one_layer(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def gemma3():
    vision = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, image_size=28,
                  patch_size=14, vision_use_head=False)  # fmt: skip
    text = {**SMALL, "vocab_size": 97, "head_dim": 8, "layer_types": ["full_attention"] * SMALL["num_hidden_layers"]}
    torch.manual_seed(0)
    config = hf.Gemma3Config(image_token_id=96, mm_tokens_per_image=4, text_config=text, vision_config=vision)
    return hf.Gemma3ForConditionalGeneration(config).eval()


def test_images_keep_their_own_rule_beside_star(gemma3):
    """Text rows are star's; the tokens of an image see each other both ways, whatever the blocks."""
    ids = IDS[:1].clamp_max(90)
    image = torch.zeros_like(ids)
    image[:, 6:10] = 1  # crosses the edge of a block of 8
    plan = Plan(24, 8, 4, 4)
    star = torch.tensor([[plan.may_attend(i, j) for j in range(24)] for i in range(24)])
    both = (image[0][:, None] == 1) & (image[0][None] == 1)
    with torch.no_grad():
        with hap.use(gemma3, "sdpa"):
            expected = gemma3(ids, attention_mask=(star | both)[None, None]).logits
            plain = gemma3(ids, attention_mask=star[None, None]).logits
        with hap.trace(gemma3) as seen, hap.use(gemma3, "star_attention", **STAR):
            torch.testing.assert_close(gemma3(ids, token_type_ids=image).logits, expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(gemma3(ids, token_type_ids=image * 0).logits, plain, atol=1e-4, rtol=1e-4)
    assert set(seen.methods) == {"star"}


def test_a_mask_tensor_of_a_users_own_runs_dense_and_says_so(llama, caplog):
    mask = torch.ones(24, 24, dtype=torch.bool).tril()[None, None].expand(2, 1, -1, -1)
    with torch.no_grad():
        expected = llama(IDS).logits
        with hap.trace(llama) as seen, hap.use(llama, "star_attention", **STAR):
            torch.testing.assert_close(llama(IDS, attention_mask=mask).logits, expected, atol=1e-5, rtol=1e-5)
    assert {call.reason for call in seen.calls} == {"a mask tensor that no plan can be read from"}


def test_is_causal_of_the_modules_decides_as_with_sdpa(llama):
    for layer in llama.model.layers:
        layer.self_attn.is_causal = False
    with torch.no_grad():
        full = llama(IDS).logits
        for name, options in (("tiled_attention", {}), ("star_attention", STAR)):
            with hap.trace(llama) as seen, hap.use(llama, name, **options):
                torch.testing.assert_close(llama(IDS).logits, full, atol=1e-5, rtol=1e-5)
                verdict = hap.check(llama, name).verdicts[0].verdict
            assert set(seen.methods) == {"tiled"}
            assert verdict == ("honoured" if name == "tiled_attention" else "passed through")


def test_a_dry_run_is_not_seen_by_hooks(llama):
    seen = []
    handles = [m.register_forward_hook(lambda *_: seen.append(1)) for m in llama.modules()]
    handles += [m.register_forward_pre_hook(lambda *_: seen.append(1)) for m in llama.modules()]
    assert hap.check(llama, "star_attention", length=3000).methods == {"star": llama.config.num_hidden_layers}
    assert seen == []
    llama(IDS)
    assert len(seen) >= len(handles) - 4, "the hooks are back"
