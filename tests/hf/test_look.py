"""What `look` measures, against weights that eager attention gives out and logits of whole forwards."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from hf_attn_plugins.hf.look.by_token import changes
from hf_attn_plugins.hf.look.reach import FIRST, WINDOWS, reach
from hf_attn_plugins.hf.predictions import backbone
from hf_attn_plugins.star.options import StarOptions
from hf_attn_plugins.star.plan import Plan

SIZES = {
    "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 50,
}  # fmt: skip
CONFIGS = {"llama": LlamaConfig(**SIZES), "mistral": MistralConfig(**SIZES, sliding_window=40)}
LENGTH = 150
PLAN = {"block_size": 16, "anchor_size": 8, "halo_size": 16, "query_size": 10}


def tiny(family: str):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[family], attn_implementation="eager").double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    return model


@pytest.fixture
def ids():
    return torch.randint(0, 50, (1, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", CONFIGS)
@torch.no_grad()
def test_shares_are_those_of_the_weights_themselves(family, ids):
    model = tiny(family)
    weights = model(ids, output_attentions=True).attentions
    plan = Plan(LENGTH, 16, 8, 10, 16)
    hidden = torch.tensor([[not plan.may_attend(i, j) for j in range(LENGTH)] for i in range(LENGTH)])
    distance = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    options = StarOptions(**PLAN, dense_heads=[[], [1]])
    found = reach(model, lambda: backbone(model)(ids, use_cache=False), options)
    assert [(each.layer, each.head, each.dense) for each in found] == [
        (0, 0, False), (0, 1, False), (1, 0, False), (1, 1, True)
    ]  # fmt: skip
    for each in found:
        own = weights[each.layer][0, 2 * each.head : 2 * each.head + 2].mean(0)
        expected = [*((own * (distance < window)).sum(-1).mean() for window in WINDOWS), own[:, :FIRST].sum(-1).mean()]
        expected.append((own * hidden).sum(-1).mean())
        torch.testing.assert_close(
            [*each.within, each.first, each.hidden], [float(x) for x in expected], rtol=1e-5, atol=1e-6
        )
    assert sum(each.hidden > 0.02 for each in found) >= (4 if family == "llama" else 1)
    assert model.config._attn_implementation == "eager"


@torch.no_grad()
def test_changes_are_those_of_whole_forwards(ids):
    model = tiny("llama")
    base = model(ids).logits[0].log_softmax(-1)
    found = changes(model, ids, "eager", [("tiled", "tiled_attention", {}), ("star", "star_attention", PLAN)])
    model.set_attn_implementation("star_attention")
    model.config.hf_attn_plugins = {"star_attention": PLAN}
    other = model(ids).logits[0].log_softmax(-1)
    kl = (base.exp() * (base - other)).sum(-1)
    star = found["star"]
    torch.testing.assert_close(star.kl[1:], kl[:-1].clamp_min(0), rtol=1e-6, atol=1e-9)
    assert star.kl[0] == 0 and not star.changed[0] and star.changed.any()
    assert torch.equal(star.changed[1:], (base.argmax(-1) != other.argmax(-1))[:-1])
    assert star.choices() >= {int(base.argmax(-1)[int(star.changed.nonzero()[0]) - 1])}
    assert star.share == pytest.approx(Plan(LENGTH, 16, 8, 10, 16).attended_pairs() / (LENGTH * (LENGTH + 1) // 2))
    assert float(found["tiled"].kl.max()) < 1e-9 and not found["tiled"].changed.any()


def test_a_model_without_causal_attention_is_refused(ids):
    with pytest.raises(ValueError, match="could be looked at"):
        reach(tiny("llama"), lambda: None, StarOptions(**PLAN))
