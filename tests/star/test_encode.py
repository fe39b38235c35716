"""The explicit form against the masked forward and against the paper's recomputing form, on tiny models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from hf_attn_plugins import star
from hf_attn_plugins.star.hf.cache import layers_of
from hf_attn_plugins.star.plan import Plan

from .families import FAMILIES, MOVING, exact, oracle, recomputed, rope_held_at, tiny, tokens


def question_logits(model: torch.nn.Module, cache: object, question: Tensor) -> Tensor:
    with torch.no_grad():
        return model(question, past_key_values=cache, use_cache=True).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("block", "anchor"), [(8, 8), (8, 3), (5, 0), (50, 10)])
def test_encoded_equals_recomputed_equals_masked(family: str, block: int, anchor: int) -> None:
    """Ragged last blocks (D4), anchors smaller than blocks, no anchor, one block; keys and question logits."""
    model = tiny(family)
    ids = tokens(37)
    plan = Plan(37, block, anchor, 4)
    context, question = ids[:, :33], ids[:, 33:]
    cache = star.encode(model, context, block_size=block, anchor_size=anchor)
    assert cache.get_seq_length() == 33 and star.plan_of(cache) == Plan(33, block, anchor)
    for (key, value), (other_key, other_value) in zip(
        layers_of(cache), layers_of(recomputed(model, context, Plan(33, block, anchor))), strict=True
    ):
        torch.testing.assert_close(key, other_key, **exact(family))
        torch.testing.assert_close(value, other_value, **exact(family))
    expected = oracle(model, ids, plan)[:, 33:]
    torch.testing.assert_close(question_logits(model, cache, question), expected, **exact(family))
    if not plan.is_dense:
        dense = oracle(model, ids, Plan(37, 50, 0, 4))[:, 33:]
        assert (dense - expected).abs().max() > 1e-3  # the comparison above would see a wrong pattern


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
@pytest.mark.parametrize("batch_blocks", [2, 3, 100])
def test_blocks_in_a_batch_change_nothing(family: str, batch_blocks: int) -> None:
    model = tiny(family)
    ids = tokens(43, batch=2)
    one, many = (star.encode(model, ids, block_size=6, anchor_size=4, batch_blocks=n) for n in (1, batch_blocks))
    for pair, other in zip(layers_of(one), layers_of(many), strict=True):
        torch.testing.assert_close(pair, other, **exact(family))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_implementations(implementation: str) -> None:
    model = tiny("mistral", torch.float32, implementation)
    ids = tokens(40)
    cache = star.encode(model, ids[:, :36], block_size=8, anchor_size=4, batch_blocks=2)
    expected = oracle(tiny("mistral", torch.float32), ids, Plan(40, 8, 4, 4))[:, 36:]
    torch.testing.assert_close(question_logits(model, cache, ids[:, 36:]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", MOVING)
def test_rotary_frequencies_are_held(family: str) -> None:
    """D10: without holding them every block is rotated differently."""
    model, fresh = tiny(family), tiny(family)
    ids = tokens(37)
    cache = star.encode(model, ids[:, :33], block_size=8, anchor_size=5, max_length=60, batch_blocks=2)
    with rope_held_at(fresh, 60):
        for pair, other in zip(
            layers_of(cache), layers_of(recomputed(fresh, ids[:, :33], Plan(33, 8, 5))), strict=True
        ):
            torch.testing.assert_close(pair, other, **exact(family))
        best = oracle(fresh, ids, Plan(37, 8, 5, 4))[:, -1].argmax()
    (answer,) = star.ask(model, cache, [ids[0, 33:]], max_new_tokens=1, do_sample=False)
    assert answer.tolist() == [best]
    assert all(getattr(m, "rope_type", "") != "frozen" for m in model.modules())
    naive = recomputed(tiny(family), ids[:, :33], Plan(33, 8, 5))
    assert (naive.layers[0].keys - cache.layers[0].keys).abs().max() > 1e-3


def test_a_longer_context_needs_the_room_it_was_encoded_for() -> None:
    model = tiny("llama_dynamic")
    cache = star.encode(model, tokens(30), block_size=8, anchor_size=5)
    with pytest.raises(ValueError, match="max_length=36"):
        star.append(model, cache, tokens(6))
    roomy = star.encode(model, tokens(30), block_size=8, anchor_size=5, max_length=40)
    assert star.append(model, roomy, tokens(6)).get_seq_length() == 36


@pytest.mark.parametrize("lengths", [(3, 10), (8, 8), (13, 30), (20, 1), (16, 0)])
def test_append_encodes_only_what_is_new(lengths: tuple[int, int]) -> None:
    model = tiny("mistral")
    ids = tokens(sum(lengths))
    cache = star.encode(model, ids[:, : lengths[0]], block_size=8, anchor_size=4)
    seen = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    longer = star.append(model, cache, ids[:, lengths[0] :], batch_blocks=2)
    hook.remove()
    assert sum(seen) == lengths[1] and cache.get_seq_length() == lengths[0]
    whole = star.encode(model, ids, block_size=8, anchor_size=4)
    for pair, other in zip(layers_of(longer), layers_of(whole), strict=True):
        torch.testing.assert_close(pair, other, **exact("mistral"))


def test_no_token_is_computed_twice_and_no_logits_at_all() -> None:
    """The anchor is never recomputed, and D8's logits over every block are never formed."""
    model = tiny("llama")
    seen, heads = [], []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    star.encode(model, tokens(50), block_size=8, anchor_size=8)
    assert sum(seen) == 50 and max(seen) == 8 and not heads


def test_progress_training_mode_and_gradients() -> None:
    model = tiny("llama").train()
    steps: list[tuple[int, int]] = []
    cache = star.encode(
        model, tokens(20), block_size=8, anchor_size=8, progress=lambda done, all_: steps.append((done, all_))
    )
    assert steps == [(0, 20), (8, 20), (16, 20), (20, 20)]
    assert model.training and not cache.layers[0].keys.requires_grad
    star.encode(model, tokens(20), block_size=8, anchor_size=8, progress=True)


def test_generate_just_works() -> None:
    """Greedy tokens are those of the masked forward, step by step; D8: the end-of-sequence token stops it."""
    model = tiny("llama")
    ids = tokens(37)
    cache = star.encode(model, ids[:, :33], block_size=8, anchor_size=4)
    expected = ids
    for _ in range(6):
        logits = oracle(model, expected, Plan(expected.shape[1], 8, 4, expected.shape[1] - 33))
        expected = torch.cat([expected, logits[:, -1:].argmax(-1)], 1)
    got = model.generate(
        input_ids=ids, past_key_values=star.branch(cache), max_new_tokens=6, do_sample=False, eos_token_id=None
    )
    assert got.tolist() == expected.tolist()
    stop = int(expected[0, 39])
    ended = model.generate(
        input_ids=ids, past_key_values=star.branch(cache), max_new_tokens=6, do_sample=False, eos_token_id=stop
    )
    assert ended[0].tolist() == expected[0, : expected[0, 37:].tolist().index(stop) + 38].tolist()
    for options in ({"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        out = model.generate(
            input_ids=ids, past_key_values=star.branch(cache), max_new_tokens=4, eos_token_id=None, **options
        )
        assert out.shape[1] == 41
    assert cache.get_seq_length() == 33


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("together", [1, 3])
def test_many_questions_over_one_cache(family: str, together: int) -> None:
    """Questions of different lengths, longer than a block too (D3), get the answers they get alone, again and again."""
    model = tiny(family)
    context = tokens(29)
    cache = star.encode(model, context, block_size=8, anchor_size=4)
    questions = [tokens(n, seed=n)[0] for n in (4, 12, 1, 4)]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    before = copy.deepcopy(layers_of(cache))
    for _ in range(2):
        answers = star.ask(model, cache, questions, together=together, **options)
        for question, answer in zip(questions, answers, strict=True):
            ids = torch.cat([context[0], question])[None]
            for token in answer.tolist():
                plan = Plan(ids.shape[1], 8, 4, ids.shape[1] - 29)
                assert token == int(oracle(model, ids, plan)[0, -1].argmax())
                ids = torch.cat([ids, torch.tensor([[token]])], 1)
    for pair, other in zip(before, layers_of(cache), strict=True):
        assert torch.equal(pair[0], other[0]) and torch.equal(pair[1], other[1])


@pytest.mark.parametrize("field", [{"cache_implementation": "static"}, {"return_dict_in_generate": True}])
def test_what_a_generation_config_says_of_the_cache_is_no_obstacle(field: dict[str, object]) -> None:
    model = tiny("llama")
    cache = star.encode(model, tokens(29), block_size=8, anchor_size=4)
    asked = dict(questions=[tokens(4)[0]], max_new_tokens=3, do_sample=False)
    expected = star.ask(model, cache, **asked)
    model.generation_config.update(**field)
    assert torch.equal(star.ask(model, cache, **asked)[0], expected[0])
    with pytest.raises(ValueError, match=f"ask.. sets {next(iter(field))}"):
        star.ask(model, cache, **asked, **field)


def test_a_second_turn_keeps_question_and_answer() -> None:
    model = tiny("llama")
    ids = tokens(37)
    cache = star.branch(star.encode(model, ids[:, :33], block_size=8, anchor_size=4))
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    first = model.generate(input_ids=ids, past_key_values=cache, **options)
    second_ids = torch.cat([first, tokens(5, seed=3)], 1)
    second = model.generate(input_ids=second_ids, past_key_values=cache, **options)
    plan = Plan(second_ids.shape[1], 8, 4, second_ids.shape[1] - 33)
    assert int(second[0, second_ids.shape[1]]) == int(oracle(model, second_ids, plan)[0, -1].argmax())
    assert star.branch(cache).get_seq_length() == 33


def test_user_errors() -> None:
    model = tiny("llama")
    cache = star.encode(model, tokens(20), block_size=8, anchor_size=4)
    with pytest.raises(ValueError, match="anchor_size <= block_size"):  # D5: the original loses tokens silently
        star.encode(model, tokens(20), block_size=8, anchor_size=9)
    with pytest.raises(ValueError, match="batch_blocks"):
        star.encode(model, tokens(20), batch_blocks=0)
    with pytest.raises(ValueError, match="token ids"):
        star.encode(model, torch.rand(3, 4))
    with pytest.raises(ValueError, match="token ids"):
        star.encode(model, torch.ones(1, 4, dtype=torch.bool))
    for sizes in ({"block_size": "8"}, {"block_size": 8, "anchor_size": "4"}, {"halo_size": 1.5}):
        with pytest.raises(ValueError, match="a whole number is needed"):
            star.encode(model, tokens(20), **sizes)
    with pytest.raises(ValueError, match="at least one token"):
        star.ask(model, cache, [[]])
    with pytest.raises(ValueError, match="input_ids"):
        star.ask(model, cache, [[5]], input_ids=tokens(3))
    with pytest.raises(ValueError, match="no record"):
        star.branch(DynamicCache())
    with pytest.raises(ValueError, match="another model"):
        star.ask(tiny("qwen3"), cache, [[5]])
    with pytest.raises(ValueError, match="2 contexts"):
        star.ask(model, star.encode(model, tokens(20, batch=2)), [[5]])


def test_models_without_causal_keys_are_refused() -> None:
    from transformers import AutoModelForCausalLM, MambaConfig, MptConfig

    small = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 4}
    with pytest.raises(NotImplementedError, match="recurrent"):
        star.encode(AutoModelForCausalLM.from_config(MambaConfig(**small)), tokens(9))
    with pytest.raises(NotImplementedError, match="places in its cache"):
        star.encode(
            AutoModelForCausalLM.from_config(MptConfig(d_model=16, n_heads=2, n_layers=1, vocab_size=50)), tokens(9)
        )
    model = tiny("llama")
    model.config.layer_types = ["chunked_attention"] * 3
    with pytest.raises(NotImplementedError, match="chunked_attention"):
        star.encode(model, tokens(9))
