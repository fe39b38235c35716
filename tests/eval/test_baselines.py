"""The baselines against attention straight from the definition, in a model too, and gone after the evaluation."""

from __future__ import annotations

import pytest
import torch
from hf_attn_plugins.eval.baselines import SinkOptions, WindowOptions, attention_sink, registered, sliding_window
from transformers import AttentionInterface, AttentionMaskInterface

import hf_attn_plugins as hap
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention, sharp_inputs
from tests.families import build


def seen_by(rows: int, keys: int, window: int, sinks: int, layer_window: int | None = None) -> torch.Tensor:
    visible = torch.zeros(rows, keys, dtype=torch.bool)
    for t in range(rows):
        position = t + keys - rows
        for s in range(position + 1):
            near = position - s < window and (layer_window is None or position - s < layer_window)
            visible[t, s] = s < sinks or near
    return visible


@pytest.mark.parametrize(("rows", "keys"), [(13, 13), (1, 13), (4, 13), (1, 1), (2, 2), (3, 5)])
@pytest.mark.parametrize(("window", "sinks"), [(5, 0), (5, 2), (1, 1), (50, 4), (3, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_baselines_see_what_their_definition_says(rows, keys, window, sinks, dtype):
    query, key, value = sharp_inputs(2, 4, 2, rows, keys, 8, dtype=dtype)
    given = {"scale": 8**-0.5, "softcap": None, "dropout": 0.0}
    mask = Mask(causal=True)
    if sinks:
        found = attention_sink(query, key, value, mask, options=SinkOptions(window, sinks), **given)
    else:
        found = sliding_window(query, key, value, mask, options=WindowOptions(window), **given)
    visible = seen_by(rows, keys, window, sinks)
    ref = dense_attention(query.double(), key.double(), value.double(), visible)[0]
    low = dense_attention(query, key, value, visible)[0]
    assert_close_to_reference(found.out, low, ref)


def test_padding_stays_hidden_from_both():
    query, key, value = sharp_inputs(2, 2, 2, 9, 9, 8)
    padding = torch.ones(2, 9, dtype=torch.bool)
    padding[1, :3] = False
    given = {"scale": 8**-0.5, "softcap": None, "dropout": 0.0}
    found = attention_sink(
        query, key, value, Mask(causal=True, key_padding=padding), options=SinkOptions(3, 2), **given
    )
    visible = seen_by(9, 9, 3, 2)[None, None] & padding[:, None, None, :]
    ref = dense_attention(query.double(), key.double(), value.double(), visible)[0]
    assert_close_to_reference(found.out, dense_attention(query, key, value, visible)[0], ref)


def test_a_layers_own_narrower_window_is_kept():
    query, key, value = sharp_inputs(1, 2, 2, 9, 9, 8)
    mask = Mask(causal=True, window=(2, None))
    found = sliding_window(
        query, key, value, mask, scale=8**-0.5, softcap=None, dropout=0.0, options=WindowOptions(window=6)
    )
    ref = dense_attention(query.double(), key.double(), value.double(), seen_by(9, 9, 6, 0, layer_window=3))[0]
    assert_close_to_reference(found.out, ref.float(), ref)


def test_in_a_model_a_wide_window_changes_nothing_a_narrow_one_much_and_both_leave_no_trace():
    model = build("llama")
    ids = torch.randint(5, 97, (1, 40), generator=torch.Generator().manual_seed(1))
    plain = model(ids).logits
    before = set(hap.PLUGINS), set(AttentionInterface._global_mapping), set(AttentionMaskInterface._global_mapping)
    with registered():
        for name in ("sliding_window", "attention_sink"):
            with hap.use(model, name, window=40):
                torch.testing.assert_close(model(ids).logits, plain, atol=1e-4, rtol=1e-4)
            with hap.use(model, name, window=4):
                narrow = model(ids).logits
                assert (narrow[:, 4] - plain[:, 4]).abs().max() < 1e-3 or name == "sliding_window"
                assert (narrow[:, -1] - plain[:, -1]).abs().max() > 0.05
                steps = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
                again = model(steps).logits[0, -2].argmax()  # decoding over a cache sees what a whole pass sees
                assert steps[0, -1] == again
        with pytest.raises(ValueError, match="sinks"), hap.use(model, "attention_sink", sinks=0):
            pass
        with pytest.raises(ValueError, match="no option"), hap.use(model, "sliding_window", sinks=4):
            pass
    assert before == (
        set(hap.PLUGINS),
        set(AttentionInterface._global_mapping),
        set(AttentionMaskInterface._global_mapping),
    )
    torch.testing.assert_close(model(ids).logits, plain)
