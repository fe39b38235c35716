"""The modules: gradients through the tables, frozen tables that notice every change, the combiners."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from hf_attn_plugins.indexed import Concatenate, IndexedCharacterAttention, Stack2D, WordEncoder, direct_attention
from hf_attn_plugins.indexed import modules as modules_module
from hf_attn_plugins.testing import assert_close_to_reference

from .cases import draw_words


def encoder(**changes) -> WordEncoder:
    torch.manual_seed(0)
    settings = {"characters": 11, "length": 7, "width": 16, "heads": 2, "form": "tables", **changes}
    return WordEncoder(**settings).double()


def gradients(form: str, indices: torch.Tensor, **changes) -> dict[str, torch.Tensor]:
    module = encoder(form=form, learned_positions=True, **changes)
    module(indices).square().sum().backward()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding_index", [None, 0])
@pytest.mark.parametrize("combiner", ["stack", "concatenate"])
def test_gradients_equal_the_direct_forms(combiner, padding_index, tied):
    indices = draw_words(9, 6, 11)
    settings = {"combiner": combiner, "padding_index": padding_index, "tie_positions": tied}
    tables, direct = (gradients(form, indices, **settings) for form in ("tables", "direct"))
    assert tables.keys() == direct.keys()
    for name, gradient in direct.items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(tables[name], gradient, rtol=1e-9, atol=1e-11)


def test_gradients_in_float32_keep_the_error_rule():
    indices = draw_words(9, 6, 11)

    def run(form: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        module = encoder(form=form).to(dtype)
        module(indices).square().sum().backward()
        return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}

    ref, low, out = run("direct", torch.float64), run("direct", torch.float32), run("tables", torch.float32)
    for name in ref:
        assert_close_to_reference(out[name], low[name], ref[name], factor=3.0, name=name)


def test_gradcheck_through_the_tables():
    module = encoder(learned_positions=True, characters=4, length=3, width=4)
    indices = draw_words(3, 3, 4)
    names, values = zip(*module.named_parameters(), strict=True)

    def forward(*parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (indices,))

    assert torch.autograd.gradcheck(forward, tuple(value.detach().requires_grad_() for value in values))


def test_the_module_is_its_attention_over_its_own_tables():
    module, indices = encoder(combiner="concatenate"), draw_words(9, 6, 11)
    own, of_positions = module.attention.weights()
    heads = direct_attention(
        module.embedding.weight, module.positions, indices, own, of_positions, heads=2, padding_index=0
    )
    torch.testing.assert_close(module(indices), heads.flatten(1) @ module.combiner.output.weight.T)


def test_heads_may_be_as_wide_as_the_embedding():
    module = encoder(heads=3, head_dim=16, outputs=2)
    assert module(draw_words(5, 7, 11)).shape == (5, 32) == (5, module.output_size)


class TestCombiners:
    def test_stack_mixes_heads_column_by_column(self):
        torch.manual_seed(0)
        stack, heads = Stack2D(3, hidden=5, outputs=2).double(), torch.randn(4, 3, 6, dtype=torch.float64)
        out = stack(heads)
        assert out.shape == (4, 12)
        for word in range(4):
            for column in range(6):
                hidden = torch.tanh(stack.hidden.weight @ heads[word, :, column])
                wanted = torch.tanh(stack.output.weight @ hidden)
                torch.testing.assert_close(out[word, 2 * column : 2 * column + 2], wanted)

    def test_concatenation_is_the_usual_output_projection(self):
        torch.manual_seed(0)
        module, heads = Concatenate(3, 6, 4), torch.randn(2, 3, 6)
        wanted = torch.cat([heads[:, h] for h in range(3)], -1) @ module.output.weight.T
        torch.testing.assert_close(module(heads), wanted)


class TestFrozen:
    @pytest.fixture
    def counted(self, monkeypatch):
        """How often tables were built, as a list that grows."""
        built, inner = [], modules_module.build_tables
        monkeypatch.setattr(modules_module, "build_tables", lambda *a, **k: built.append(1) or inner(*a, **k))
        return built

    @torch.no_grad()
    def test_tables_are_built_once(self, counted):
        module, indices = encoder(), draw_words(5, 7, 11)
        wanted = module(indices)
        module.freeze()
        for _ in range(3):
            torch.testing.assert_close(module(indices), wanted)
        torch.testing.assert_close(module(indices[:, :4]), encoder()(indices[:, :4]))
        assert len(counted) == 1 + 1 + 1
        module.unfreeze()
        module(indices)
        module(indices)
        assert len(counted) == 5

    @pytest.mark.parametrize("name", [name for name, _ in encoder().attention.named_parameters()] + ["F", "P"])
    @torch.no_grad()
    def test_every_weight_that_changes_refreshes_them(self, name):
        module, indices = encoder().freeze(), draw_words(5, 7, 11)
        before = module(indices)
        known = {"F": module.embedding.weight, "P": module.positions}
        tensor = known[name] if name in known else module.attention.get_parameter(name)
        tensor[3].mul_(3.0)
        after = module(indices)
        assert (after - before).abs().max() > 1e-4
        torch.testing.assert_close(after, module.unfreeze()(indices))

    def test_an_optimiser_step_and_a_loaded_state_refresh_them(self):
        module, indices = encoder(), draw_words(5, 7, 11)
        state = copy.deepcopy(module.state_dict())
        module.freeze()
        with torch.no_grad():
            first = module(indices)
        optimiser = torch.optim.AdamW(module.parameters(), lr=0.1)
        module(indices).sum().backward()
        optimiser.step()
        with torch.no_grad():
            second = module(indices)
            assert (second - first).abs().max() > 1e-3
            torch.testing.assert_close(second, copy.deepcopy(module).unfreeze()(indices))
            module.load_state_dict(state)
            torch.testing.assert_close(module(indices), first)

    @torch.no_grad()
    def test_a_cast_refreshes_them(self):
        module, indices = encoder().freeze(), draw_words(5, 7, 11)
        wide = module(indices)
        assert module.float()(indices).dtype == torch.float32
        module.bfloat16()
        assert module(indices).dtype == torch.bfloat16
        torch.testing.assert_close(module.double()(indices), wide, rtol=0.1, atol=0.05)

    def test_gradients_still_flow(self):
        module, indices = encoder().freeze(), draw_words(5, 7, 11)
        module(indices).sum().backward()
        assert module.attention.query.weight.grad is not None

    def test_inference_tensors_are_never_kept(self, counted):
        with torch.inference_mode():
            module, indices = encoder().freeze(), draw_words(5, 7, 11)
            first = module(indices)
            module.embedding.weight.mul_(3.0)
            assert (module(indices) - first).abs().max() > 1e-4
        assert len(counted) == 2

    @torch.no_grad()
    def test_they_are_left_out_of_copies_pickles_and_state(self):
        module, indices = encoder().freeze(), draw_words(5, 7, 11)
        wanted, keys = module(indices), module.state_dict().keys()
        assert module.attention._kept is not None
        assert keys == encoder().state_dict().keys()
        stream = io.BytesIO()
        torch.save(module, stream)
        stream.seek(0)
        for other in (copy.deepcopy(module), torch.load(stream, weights_only=False)):
            assert other.attention._kept is None and other.attention.frozen
            torch.testing.assert_close(other(indices), wanted)


def test_auto_chooses_the_cheaper_form(monkeypatch):
    used = []
    for name in ("direct_attention", "indexed_attention"):
        inner = getattr(modules_module, name)
        monkeypatch.setattr(modules_module, name, lambda *a, _n=name, _f=inner, **k: used.append(_n) or _f(*a, **k))
    module = encoder(form="auto")
    with torch.no_grad():
        module(draw_words(1, 7, 11))
        module(draw_words(200, 7, 11))
    assert used == ["direct_attention", "indexed_attention"]


def test_compiled_it_gives_the_same(monkeypatch):
    module, indices = encoder().freeze(), draw_words(5, 7, 11)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(indices), module(indices))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"form": "tabels"}, "form='tabels'"),
        ({"combiner": "sum"}, "combiner='sum'"),
        ({"width": 16, "heads": 3}, "pass head_dim"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        encoder(**settings)


def test_words_longer_than_the_positions_are_refused():
    module = IndexedCharacterAttention(8)
    with pytest.raises(ValueError, match="positions for 1 to 3"):
        module(torch.zeros(2, 4, dtype=torch.int64), torch.randn(5, 8), torch.randn(3, 8))
