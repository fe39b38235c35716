"""The operators: fake tensors, autograd registration, torch.compile, dropout, and what importing costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from hf_attn_plugins.core.drops import Drops
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.kernels import attend
from tests.kernels.triton_cases import draw, needs_interpreter, padding

pytestmark = needs_interpreter


def arguments(**changes):
    """The operator's arguments after query, key and value, in the order of `triton_ops.OPTIONS`."""
    fields = dict(
        row_labels=None, key_labels=None, bias=None, offset_tensor=None, row_hashes=None, key_hashes=None, scale=0.25,
        softcap=None, left=None, right=None, offset=0, dropout=0.0, pieces=[],
    )  # fmt: skip
    return tuple((fields | changes).values())


def hashes(*size, seed):
    """The places of (batch, heads, rows, keys) under a seed, as arguments."""
    drops = Drops.draw(torch.empty(size[:2]), *size[2:])._replace(seed=torch.tensor(seed))
    return dict(zip(("row_hashes", "key_hashes"), drops.tables(), strict=True))


@pytest.mark.parametrize(
    "changes",
    [
        dict(right=0, offset=-1),
        dict(key_labels=torch.zeros(1, 17, dtype=torch.int32), softcap=3.0),
        dict(dropout=0.25, **hashes(1, 4, 18, 17, seed=7), right=0, offset_tensor=torch.tensor(-1)),
    ],
    ids=["causal", "labels", "dropout and a tensor offset"],
)
def test_opcheck(changes):
    from hf_attn_plugins.kernels.triton.ops import triton_attention

    inputs = [x.requires_grad_() for x in draw(1, 18, 17)]
    torch.library.opcheck(triton_attention, (*inputs, *arguments(**changes)))


def test_opcheck_of_the_backward():
    from hf_attn_plugins.kernels.triton.ops import triton_attention, triton_attention_backward

    query, key, value = draw(1, 18, 17)
    out, lse, row_lse = triton_attention(query, key, value, *arguments(right=0, offset=-1))
    given = (torch.randn_like(out), torch.randn_like(lse), query, key, value, out, row_lse)
    torch.library.opcheck(triton_attention_backward, (*given, *arguments(right=0, offset=-1)))


@pytest.mark.parametrize("rows", [2, 20])
def test_compiles_as_one_graph(rows):
    query, key, value = (x.requires_grad_() for x in draw(3, rows, 24))
    real = padding(3, 24)

    def call(query, key, value, real):
        mask = Mask(causal=True, key_padding=real)
        part = attend(query, key, value, mask=mask, kernel="triton")
        return part.out, part.lse

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected, got = call(query, key, value, real), compiled(query, key, value, real)
    for one, other in zip(expected, got, strict=True):
        assert torch.equal(one, other)
    gradients = [torch.autograd.grad(out.square().sum(), (query, key, value)) for out, _ in (expected, got)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_dropout_keeps_the_right_share_and_its_gradients_use_the_same_mask():
    """With the identity as value, out shows the kept weights: their mask gives the exact gradients."""
    from hf_attn_plugins.kernels.triton.ops import triton_attention

    torch.manual_seed(0)
    keys, p = 64, 0.3
    query, key = torch.randn(2, 2, 40, 16), torch.randn(2, 1, keys, 16)
    value = torch.eye(keys).expand(2, 1, keys, keys).clone()
    for x in (query, key, value):
        x.requires_grad_()
    given = arguments(dropout=p, **hashes(2, 2, 40, keys, seed=123456789123), right=0, offset=keys - 40)
    out, lse, _ = triton_attention(query, key, value, *given)
    plain, plain_lse, _ = triton_attention(query, key, value, *arguments(right=0, offset=keys - 40))
    torch.testing.assert_close(lse, plain_lse)
    seen = plain > 0
    drawn = out.detach() / plain.detach().where(seen, torch.ones(()))
    assert bool(
        torch.isclose(drawn[seen], torch.zeros(()))
        .logical_or(torch.isclose(drawn[seen], torch.tensor(1 / (1 - p))))
        .all()
    )
    dropped = (drawn[seen] == 0).float().mean().item()
    assert abs(dropped - p) < 4 * (p * (1 - p) / int(seen.sum())) ** 0.5
    assert not torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[:, 0], drawn[:, 1])
    grad = torch.randn_like(out)
    got = torch.autograd.grad(out, (query, key, value), grad)
    scores = query @ key.mT * 0.25
    causal = torch.ones(40, keys, dtype=torch.bool).tril(keys - 40)
    dense = (scores.masked_fill(~causal, -torch.inf).softmax(-1) * drawn.where(causal, torch.zeros(()))) @ value
    wanted = torch.autograd.grad(dense, (query, key, value), grad)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_dropout_is_the_same_in_prefill_and_decode_tiles():
    """The mask belongs to (seed, head, row, key): the last rows alone draw it again with their own row numbers."""
    from hf_attn_plugins.kernels.triton.ops import triton_attention

    query, key, value = draw(1, 20, 24)

    def first(rows):
        given = arguments(dropout=0.5, **hashes(1, query.shape[1], rows, 24, seed=5))
        return triton_attention(query[:, :, :rows], key, value, *given)[0]

    whole, few = first(20), first(3)
    torch.testing.assert_close(whole[:, :, :3], few, atol=1e-5, rtol=1e-5)


def test_attend_draws_a_new_dropout_mask_each_call():
    query, key, value = draw(1, 20, 24)
    torch.manual_seed(3)
    first, second = (attend(query, key, value, dropout=0.5, kernel="triton").out for _ in range(2))
    torch.manual_seed(3)
    again = attend(query, key, value, dropout=0.5, kernel="triton").out
    assert torch.equal(first, again) and not torch.equal(first, second)


def test_importing_the_package_imports_no_triton():
    code = (
        "import sys, hf_attn_plugins, hf_attn_plugins.kernels, hf_attn_plugins.kernels.triton.attend\n"
        "found = [name for name in sys.modules if name.startswith('hf_attn_plugins.kernels.triton.')]\n"
        "assert {name.rpartition('.')[2] for name in found} == {'attend', 'support'}, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
