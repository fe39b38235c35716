"""A structured mask is a tensor to everyone who computes with it, and stays a structure where it is only passed on."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as hf
from transformers import masking_utils

import hf_attn_plugins as hap
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.warn import forget_warnings
from hf_attn_plugins.hf.masks.mask_function import mask_function
from hf_attn_plugins.hf.masks.structured_mask import Structure, StructuredMask, TracedMask

PADDING = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
SEGMENTS = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 1]])
LEFT = torch.tensor([2, 0])
IMAGE = torch.tensor([[-1, -1, 0, 0, -1, 1, 1], [-1, 0, 0, 0, 0, -1, -1]])
causal = masking_utils.causal_mask_function
FUNCTIONS = {
    "causal": causal,
    "full": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(3),
    "chunks": masking_utils.chunked_causal_mask_function(3, LEFT),
    "packed": masking_utils.and_masks(causal, masking_utils.packed_sequence_mask_function(SEGMENTS)),
    "packed chunks": masking_utils.and_masks(
        masking_utils.chunked_causal_mask_function(3, LEFT), masking_utils.packed_sequence_mask_function(SEGMENTS)
    ),
    "two windows": masking_utils.and_masks(
        masking_utils.sliding_window_causal_mask_function(4), masking_utils.sliding_window_overlay(2)
    ),
    "own condition": masking_utils.and_masks(causal, lambda b, h, q, k: (q + k) % 3 != 1),
    "image": masking_utils.or_masks(causal, masking_utils.blockwise_overlay(IMAGE)),
    "packed image": masking_utils.and_masks(
        masking_utils.or_masks(causal, masking_utils.blockwise_overlay(IMAGE)),
        masking_utils.packed_sequence_mask_function(SEGMENTS),
    ),
}
CAUSAL = set(FUNCTIONS) - {"full"}


def by_hand(function, padding=None, first=0):
    """The definition, pair by pair."""
    b, q, k = torch.arange(2)[:, None, None], torch.arange(first, 7)[None, :, None], torch.arange(7)[None, None]
    seen = function(b, torch.zeros_like(b), q, k).expand(2, 7 - first, 7)
    return (seen if padding is None else seen & padding[:, None])[:, None]


@pytest.mark.parametrize("padding", [None, PADDING], ids=["plain", "padded"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_recognised_masks_mean_what_their_functions_mean(name, padding):
    function = FUNCTIONS[name]
    for first in (0, 3):
        if first and "packed" in name:
            continue  # Transformers packs whole prompts only
        mask = mask_function(2, 7 - first, 7, first, 0, function, padding)
        assert mask.structure.is_causal == (name in CAUSAL) and mask.structure.recognised
        assert torch.equal(mask & True, by_hand(function, padding, first))


@pytest.mark.parametrize("name", ["causal", "window", "chunks", "packed", "image", "own condition"])
def test_plans_can_be_read_from_all_but_the_predicates(name):
    read = mask_function(2, 7, 7, 0, 0, FUNCTIONS[name]).structure.mask
    assert (read.predicate is None) == (name not in ("image", "own condition"))
    assert (read.beside is not None) == (name == "image")


def test_passing_on_keeps_the_structure_and_computing_gives_numbers():
    mask = mask_function(2, 7, 7, 0, 0, causal, PADDING)
    expected = by_hand(causal, PADDING)
    for kept in (mask.to("cpu"), mask.clone(), mask.contiguous(), mask.detach(), copy.deepcopy(mask), mask[:]):
        assert isinstance(kept, StructuredMask) and torch.equal(kept & True, expected)
    last = mask[:, :, -2:]
    assert isinstance(last, StructuredMask) and torch.equal(last & True, expected[:, :, -2:])
    assert torch.equal(mask[..., 2:5], expected[..., 2:5]) and torch.equal(mask[0], expected[0])
    assert torch.equal(torch.where(mask, 0.0, -1.0), torch.where(expected, 0.0, -1.0))
    assert torch.equal(torch.cat([mask, mask], -1), torch.cat([expected, expected], -1))
    assert mask.dtype == torch.bool and mask.shape == (2, 1, 7, 7) and bool(mask.any())


def test_functions_that_take_plain_numbers_are_written_out_by_vmap():
    def chunked(b, h, q, k):
        return torch.div(q, 3, rounding_mode="trunc") >= torch.div(k, 3, rounding_mode="trunc")

    mask = mask_function(2, 7, 7, 0, 0, chunked, PADDING, use_vmap=True)
    assert torch.equal(mask & True, by_hand(chunked, PADDING))


def test_families_without_sdpa_get_floats_to_add():
    config = hf.Gemma2Config(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, head_dim=4)
    assert not hf.Gemma2ForCausalLM._supports_sdpa  # and its file is imported
    mask = mask_function(2, 7, 7, 0, 0, causal, PADDING, config=config, dtype=torch.bfloat16)
    seen = by_hand(causal, PADDING)
    lowest = torch.finfo(torch.bfloat16).min
    assert mask.dtype == torch.bfloat16
    assert torch.equal(mask + 0, torch.where(seen, 0.0, lowest).to(torch.bfloat16))


TINY = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)


def test_doge_stays_causal():
    """Doge branches on the mask's type and adds its own bias to it."""
    torch.manual_seed(0)
    model = hf.DogeForCausalLM(hf.DogeConfig(**TINY, num_key_value_heads=2, vocab_size=97)).eval()
    ids = torch.randint(5, 90, (1, 24), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[:, -1] = 95
    with torch.no_grad():
        expected = model(ids).logits
        with hap.use(model, "tiled_attention"):
            torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(model(ids).logits[:, :-1], model(changed).logits[:, :-1], atol=1e-5, rtol=1e-5)


def test_siglip2_computes_with_its_mask():
    model = hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**TINY, num_patches=16, patch_size=4)).eval()
    inputs = dict(
        pixel_values=torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(0)),
        pixel_attention_mask=(torch.arange(16) < torch.tensor([[16], [9]])).long(),
        spatial_shapes=torch.tensor([[4, 4], [3, 3]]),
    )
    with torch.no_grad():
        expected = model(**inputs).pooler_output
        with hap.use(model, "tiled_attention"):
            torch.testing.assert_close(model(**inputs).pooler_output, expected, atol=1e-5, rtol=1e-5)
    verdicts = {v.module_class: v.verdict for v in hap.check(model, "tiled_attention").verdicts}
    assert verdicts == {"Siglip2Attention": "honoured", "MultiheadAttention": "left as it is"}


@pytest.mark.parametrize("dtype", [torch.long, torch.int32, torch.uint8])
def test_integer_masks_of_users_are_refused(dtype):
    from tests.families import build

    model = build("llama")
    ids = torch.randint(5, 90, (1, 8))
    mask = torch.ones(8, 8).tril().to(dtype)[None, None]
    for name in hap.PLUGINS:
        with hap.use(model, name), pytest.raises(ValueError, match=rf"{dtype}.*mask.bool\(\)"):
            model(ids, attention_mask=mask)
    with hap.use(model, "tiled_attention"), pytest.raises(ValueError, match="must broadcast"):
        model(ids, attention_mask=mask.bool()[..., :5])


# What modeling code does with masks; x is (2, 1, 7, 7).
USES = {
    "methods": lambda mask, x: mask.repeat(1, 2, 1, 1).reshape(-1, 7, 7),
    "attributes": lambda mask, x: x * 2 if mask.dtype == torch.bool and mask.dim() == 4 else x,
    "functions": lambda mask, x: torch.where(mask, torch.full((), 0.0), -1.0),
    "functions of lists": lambda mask, x: torch.cat([mask, mask], -1),
    "another dtype": lambda mask, x: mask.to(device=x.device, dtype=x.dtype),
    "sums": lambda mask, x: x + mask[:, :, :, : x.shape[-1]],
    "operators": lambda mask, x: (x > 0) & mask | (mask < 1),
    "not equal": lambda mask, x: mask != 0,
    "equal": lambda mask, x: mask == 0,
    "cut keys": lambda mask, x: mask[:, :, :, :3],
    "cut queries": lambda mask, x: mask[:, :, -2:] + 0.0,
    "one head": lambda mask, x: mask[:, 0],
}


@pytest.mark.parametrize("use", USES)
def test_code_that_computes_with_a_mask_is_traced(use):
    x = torch.randn(2, 1, 7, 7, generator=torch.Generator().manual_seed(0))

    def made(kind, padding):
        return kind(Structure(Mask(causal=True, key_padding=padding), (2, 1, 7, 7)), padding.device)

    torch.compiler.reset()
    graph = torch.compile(lambda padding: USES[use](made(TracedMask, padding), x), backend="eager", fullgraph=True)
    dense = PADDING[:, None, None] & torch.ones(7, 7, dtype=torch.bool).tril()
    assert torch.equal(graph(PADDING), USES[use](dense, x))
    assert torch.equal(USES[use](made(StructuredMask, PADDING), x), USES[use](dense, x))


def test_a_compiled_model_that_knows_block_masks_still_sees_causally():
    config = hf.DogeConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, keep_window_size=4, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model, ids = hf.DogeForCausalLM(config).eval(), torch.arange(11, 30)[None]
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with hap.use(model, "tiled_attention"):
            found = torch.compile(model, backend="eager")(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_compiled_model_that_asks_for_the_type_of_the_users_mask_alone_keeps_its_plan():
    config = hf.CTRLConfig(vocab_size=99, n_positions=64, n_embd=32, dff=48, n_layer=2, n_head=2)
    torch.manual_seed(0)
    model, ids = hf.CTRLLMHeadModel(config).eval(), torch.arange(11, 51)[None]
    with torch.no_grad(), hap.use(model, "star_attention", block_size=8, anchor_size=4, query_size=6):
        expected = model(ids).logits
        with hap.trace(model) as seen:
            found = torch.compile(model, backend="eager")(ids).logits
    assert seen.methods == {"star": 2}
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_mask_tensor_in_a_graph_is_named_as_in_an_eager_call(caplog):
    config = hf.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    model, ids = hf.LlamaForCausalLM(config).eval(), torch.arange(11, 51)[None]
    mask = torch.ones(40, 40, dtype=torch.bool).tril()[None, None]
    for call in (model, torch.compile(model, backend="eager")):
        forget_warnings()
        with torch.no_grad(), hap.use(model, "star_attention", block_size=8), hap.trace(model) as seen:
            call(ids, attention_mask=mask, use_cache=False)
        assert "a mask tensor that no plan can be read from" in str(seen)
    said = [record.getMessage() for record in caplog.records if "the attention mask is a tensor" in record.getMessage()]
    assert len(said) == 2


def test_masks_of_another_rank_or_batch_are_refused_in_one_line():
    from tests.families import build

    model, ids = build("llama"), torch.randint(5, 90, (1, 8))
    for shape in ((8, 8), (1, 8, 8), (1, 1, 1, 8, 8), (8,)):
        for name in hap.PLUGINS:
            with hap.use(model, name), pytest.raises(ValueError, match=r"an attention mask is \(1, keys\)"):
                model(ids, attention_mask=torch.ones(shape, dtype=torch.bool))


@pytest.mark.parametrize("name", ["idx", "states", "pixel_values_videos", "input_features", "offset_mapping"])
def test_tensors_beside_the_ids_change_nothing_unless_the_family_names_them(name):
    from tests.families import build

    model, ids = build("llama"), torch.randint(5, 90, (1, 8))
    with torch.no_grad(), hap.use(model, "tiled_attention"):
        expected = model(ids).logits
        extra = torch.rand(1, 8) if name in ("pixel_values_videos", "input_features") else torch.ones(1, 8).long()
        assert torch.equal(model(ids, **{name: extra}).logits, expected)


def test_keywords_that_a_family_names_are_told_from_parts_of_others():
    from hf_attn_plugins.hf.models.families import names_keyword

    class Base(torch.nn.Module):
        def forward(self, attend, x, **kwargs):
            return attend(x, layer_idx=3, soft_bias=kwargs["slopes"])

    class Attention(Base):
        pass

    named = {key: names_keyword(Attention, key) for key in ("soft_bias", "slopes", "idx", "bias", "slope", "layer_idx")}
    assert named == {"soft_bias": True, "slopes": True, "idx": False, "bias": False, "slope": False, "layer_idx": True}
    from transformers.models.gpt_oss import modeling_gpt_oss  # noqa: F401 (its own attention is asked)

    model_code = type("Gpt", (torch.nn.Module,), {"__module__": "transformers.models.gpt_oss.modeling_gpt_oss"})
    assert names_keyword(model_code, "scaling") and not names_keyword(model_code, "weights")
