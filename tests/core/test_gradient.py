"""`needs_gradient`: whether autograd records."""

from __future__ import annotations

import pytest
import torch

from hf_attn_plugins.core.gradient import needs_gradient


@pytest.mark.parametrize("count", range(4))
def test_it_is_what_autograd_does(count):
    for which in (None, *range(count)):
        tensors = [torch.ones(2, requires_grad=index == which) for index in range(count)]
        assert needs_gradient(*tensors) == (which is not None)
        if tensors:
            assert needs_gradient(*tensors) == sum(tensors).requires_grad
        with torch.no_grad():
            assert not needs_gradient(*tensors)
        with torch.inference_mode():
            assert not needs_gradient(*tensors)


def test_it_does_not_break_a_graph():
    def double(x, y):
        return x * 2 if needs_gradient(y, x) else x

    compiled = torch.compile(double, fullgraph=True, backend="eager")
    x = torch.ones(2)
    assert compiled(x, x).tolist() == [1, 1]
    assert compiled(x, x.clone().requires_grad_()).tolist() == [2, 2]
