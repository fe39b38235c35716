"""Evaluation mode for a while, each module's own mode restored."""

from __future__ import annotations

import pytest
from torch import nn

from hf_attn_plugins.hf.models.evaluating import evaluating


@pytest.mark.parametrize("fails", (False, True))
def test_every_module_has_its_own_mode_again(fails):
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model.train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    try:
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            if fails:
                raise KeyError
    except KeyError:
        assert fails
    assert [module.training for module in model.modules()] == before == [True, True, False, False]
