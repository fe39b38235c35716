"""`attn_implementation="star_attention"` on tiny models: forward, padding, generation, training, and `encode`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_attn_plugins as hap
from hf_attn_plugins.star.plan import Plan
from tests.older import OLDER, needs_common_masks

from .families import FAMILIES, MOVING, exact, oracle, recomputed, seen_by_plan, tiny, tokens

SIZES = {"block_size": 8, "anchor_size": 4, "query_size": 4}


def starred(family: str, dtype: torch.dtype = torch.float64, **sizes: int) -> PreTrainedModel:
    model = tiny(family, dtype, "star_attention")
    hap.configure(model, "star_attention", **{**SIZES, **sizes})
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, **options: object) -> Tensor:
    return model(ids, **options).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("block", "anchor"), [(8, 8), (8, 3), (5, 0), (50, 10)])
def test_one_forward_is_the_masked_one(family: str, block: int, anchor: int) -> None:
    ids = tokens(37, batch=2)
    got = logits(starred(family, block_size=block, anchor_size=anchor), ids)
    torch.testing.assert_close(got, oracle(tiny(family), ids, Plan(37, block, anchor, 4)), **exact(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_three_forms_agree(family: str) -> None:
    """Stateless, explicit and recomputing, through the same kernels: to rounding in float64, softcap and sinks too."""
    ids = tokens(37)
    model = tiny(family, implementation="tiled_attention")
    cache = hap.star.encode(model, ids[:, :33], block_size=8, anchor_size=4, batch_blocks=2)
    paper = recomputed(model, ids[:, :33], Plan(33, 8, 4))
    forms = [
        logits(starred(family), ids)[:, 33:],
        logits(model, ids[:, 33:], past_key_values=cache),
        logits(model, ids[:, 33:], past_key_values=paper),
    ]
    for other in forms[1:]:
        torch.testing.assert_close(forms[0], other, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_bfloat16_by_the_error_rule(family: str) -> None:
    ids = tokens(37)
    reference = oracle(tiny(family), ids, Plan(37, 8, 4, 4))
    low = oracle(tiny(family, torch.bfloat16), ids, Plan(37, 8, 4, 4))
    from hf_attn_plugins.testing import assert_close_to_reference

    assert_close_to_reference(logits(starred(family, torch.bfloat16), ids), low, reference, factor=3)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_nothing(family: str, side: str) -> None:
    model = starred(family)
    lengths = [37, 22, 30]
    ids, mask = torch.zeros(3, 37, dtype=torch.long), torch.zeros(3, 37, dtype=torch.long)
    for row, length in enumerate(lengths):
        place = slice(37 - length, 37) if side == "left" else slice(0, length)
        ids[row, place], mask[row, place] = tokens(length, seed=row)[0], 1
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    got = logits(model, ids, attention_mask=mask, position_ids=position)
    assert got.isfinite().all()
    for row, length in enumerate(lengths):
        alone = logits(model, tokens(length, seed=row))
        torch.testing.assert_close(got[row][mask[row].bool()], alone[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_generation_is_dense_after_the_prompt(family: str, cache: str | None) -> None:
    model = starred(family)
    ids = tokens(29)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    got = model.generate(ids, cache_implementation=cache, **options)
    expected, check = ids, tiny(family)
    for _ in range(5):
        plan = Plan(expected.shape[1], 8, 4, expected.shape[1] - 25)
        expected = torch.cat([expected, oracle(check, expected, plan)[:, -1:].argmax(-1)], 1)
    assert got.tolist() == expected.tolist()


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_later_chunk_is_a_query(family: str) -> None:
    model = starred(family)
    ids = tokens(45)
    with torch.no_grad():
        first = model(ids[:, :33], use_cache=True)
        second = model(ids[:, 33:], past_key_values=first.past_key_values).logits
    expected = oracle(tiny(family), ids, Plan(45, 8, 4, 16))  # the first prompt's query and all that came later
    torch.testing.assert_close(second, expected[:, 33:], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("family", MOVING)
def test_one_forward_has_one_set_of_frequencies(family: str) -> None:
    """D10: a prompt in one forward is rotated by its full length, as dense attention would."""
    ids = tokens(37)
    torch.testing.assert_close(
        logits(starred(family), ids), oracle(tiny(family), ids, Plan(37, 8, 4, 4)), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training(family: str, checkpointing: bool) -> None:
    from .families import as_masks, seen_by_plan

    ids = tokens(37, batch=2)
    model, dense = starred(family).train(), tiny(family).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    position = torch.arange(37)
    masks = as_masks(dense, seen_by_plan(Plan(37, 8, 4, 4))[None], (position[:, None] - position)[None])
    loss = model(ids, labels=ids, use_cache=False).loss
    expected = dense(ids, labels=ids, attention_mask=masks, use_cache=False).loss
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    for (name, one), other in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")


def test_options_are_saved_with_the_model(tmp_path: Path) -> None:
    model = starred("llama")
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="star_attention", dtype=torch.float64)
    ids = tokens(37)
    # Loading keeps rotary frequencies in float32, which `to(float64)` does not.
    torch.testing.assert_close(logits(again, ids), logits(model, ids), rtol=1e-4, atol=1e-4)
    assert (logits(again, ids) - oracle(tiny("llama"), ids, Plan(37, 50, 0, 4))).abs().max() > 1e-2
    with pytest.raises(ValueError, match="anchor_size <= block_size"):
        hap.configure(model, "star_attention", anchor_size=9)


def test_short_prompts_are_dense_by_default() -> None:
    ids = tokens(37)
    model = tiny("llama", implementation="star_attention")
    torch.testing.assert_close(logits(model, ids), logits(tiny("llama"), ids), rtol=1e-10, atol=1e-10)


def test_encoding_with_a_model_that_is_set_to_star() -> None:
    """The blocks are cut by `encode`, not a second time inside the model; its setting is what it was afterwards."""
    ids = tokens(37)
    model = starred("llama", block_size=4, anchor_size=2)
    cache = hap.star.encode(model, ids[:, :33], block_size=8, anchor_size=4)
    assert model.config._attn_implementation == "star_attention"
    expected = oracle(tiny("llama"), ids, Plan(37, 8, 4, 4))[:, 33:]
    torch.testing.assert_close(logits(model, ids[:, 33:], past_key_values=cache), expected, rtol=1e-10, atol=1e-10)


def test_no_process_group_is_needed() -> None:
    """D6: the original's dense and library use fail without one; importing it fails too."""
    assert not torch.distributed.is_available() or not torch.distributed.is_initialized()
    assert logits(starred("llama"), tokens(20)).shape[1] == 20


def test_recurrent_layers_are_passed_by() -> None:
    from transformers import BambaConfig

    config = BambaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8,
        mamba_n_groups=1, mamba_chunk_size=8, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="star_attention").eval()
    needs_common_masks(model)
    hap.configure(model, "star_attention", **SIZES)
    ids = tokens(37)
    star = logits(model, ids, use_cache=False)
    model.set_attn_implementation("sdpa")
    dense = logits(model, ids, use_cache=False)
    # The first block is the same either way, and the attention layer of later ones is not.
    torch.testing.assert_close(star[:, :8], dense[:, :8], rtol=1e-4, atol=1e-4)
    assert (star[:, 8:] - dense[:, 8:]).abs().max() > 1e-4
    with pytest.raises(NotImplementedError, match="recurrent"):
        hap.star.encode(model, ids)


def test_llama_4_is_star_within_its_chunks() -> None:
    """Three layers see only their own chunk of 16 tokens, each a prompt of its own; the fourth sees everything."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, attention_chunk_size=16, num_local_experts=2,
        pad_token_id=0, no_rope_layers=[1, 1, 1, 0],
    )  # fmt: skip
    torch.manual_seed(0)
    model = Llama4ForCausalLM(config).double().eval()
    needs_common_masks(model)
    ids = tokens(40)
    chunks = [seen_by_plan(Plan(length, 8, 4, 4)) for length in (16, 16, 8)]
    masks = {"full_attention": seen_by_plan(Plan(40, 8, 4, 4)), "chunked_attention": torch.block_diag(*chunks).bool()}
    expected = logits(model, ids, attention_mask={name: mask[None, None] for name, mask in masks.items()})
    with hap.use(model, "star_attention", **SIZES), hap.trace(model) as seen:
        predicted = hap.check(model, "star_attention", length=40)
        got = logits(model, ids)
    assert predicted.ok and (OLDER or predicted.methods == seen.methods)  # older RoPE does not run on the meta device
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)
    assert seen.methods == {"star": 4} and seen.share == pytest.approx(
        (3 * sum(int(chunk.sum()) for chunk in chunks) + int(masks["full_attention"].sum())) / (3 * 308 + 820)
    )
