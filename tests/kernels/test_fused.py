"""The compiled CPU kernels in bfloat16 against the oracle, with outputs poisoned; how they are built and done without.

What multiplies bfloat16 here, or else whatever this CPU has; `test_fused_float32.py` has float32 and the other sets.
"""

from __future__ import annotations

import ctypes
import os
import re
import stat
from pathlib import Path

import pytest
import torch

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.kernels.cpu_fused import build, call, instruction_sets, layout
from hf_attn_plugins.kernels.cpu_fused.build import library, unavailable
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention, sharp_inputs, visibility
from tests import forks
from tests.kernels.fused_cases import allowing, kinds
from tests.kernels.test_attend import MASKS, as_mask

on_each_set = pytest.mark.usefixtures("instructions")
needs_library = pytest.mark.skipif(unavailable() is not None, reason=f"cpu_fused: {unavailable()}")
# Few rows, which hold keys instead of queries, in chunks of 512; fewer and more rows than the 64 held; more keys than a
# tile of 96; more rows than keys; ragged last steps.
SHAPES = [(1, 1), (1, 1030), (7, 7), (20, 530), (31, 12), (64, 96), (65, 129), (70, 201), (200, 71), (130, 330)]
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nothing was written to holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[kind.instructions for kind in kinds(("bfloat16",))] or ["avx512"])
def instructions(request):
    """One of the sets that multiply bfloat16."""
    with allowing(request.param):
        yield request.param


def losses(function, inputs, dtype, seen, grads):
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    out, lse = function(*leaves)
    lse = torch.where(seen.expand(lse.shape), lse, 0)
    loss = (out * grads[0].to(out.dtype)).sum() + (lse * grads[1].to(lse.dtype)).sum()
    return out.detach(), lse.detach(), torch.autograd.grad(loss, leaves)


@on_each_set
@needs_library
@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(name, shape):
    rows, keys = shape
    fields = MASKS[name](3, rows, keys)
    visible = visibility(rows, keys, **fields)
    seen = visible.any(-1)
    inputs = sharp_inputs(3, 4, 2, rows, keys, 32, 48, dtype=BF16)
    grads = torch.randn(3, 4, rows, 48, dtype=torch.float64), torch.randn(3, 4, rows, dtype=torch.float64)
    ref_out, ref_lse, ref = losses(lambda *x: dense_attention(*x, visible), inputs, torch.float64, seen, grads)
    low_out, low_lse, low = losses(lambda *x: dense_attention(*x, visible), inputs, BF16, seen, grads)
    mask = as_mask(fields)
    out, lse, got = losses(lambda *x: attend(*x, mask=mask, kernel="cpu_fused"), inputs, BF16, seen, grads)
    assert (out[~seen.expand(out.shape[:-1])] == 0).all()
    assert_close_to_reference(out, low_out, ref_out)
    assert_close_to_reference(lse, low_lse, ref_lse, 3.0, "lse")
    for which, g, lo, r in zip(("query", "key", "value"), got, low, ref, strict=True):
        assert_close_to_reference(g, lo, r, 3.0, f"grad_{which}")
    assert torch.equal(attend(*inputs, mask=mask, kernel="cpu_fused").lse == -torch.inf, ~seen.expand(lse.shape))


@on_each_set
@needs_library
@pytest.mark.parametrize("head_dims", [(16, 16), (64, 64), (80, 64), (128, 128), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("rows", [3, 90])
def test_head_dims_and_shared_keys(head_dims, heads, rows):
    inputs = sharp_inputs(2, *heads, rows, 150, *head_dims, dtype=BF16)
    visible = visibility(rows, 150, is_causal=True)
    seen = visible.any(-1)
    grads = torch.randn(2, heads[0], rows, head_dims[1]), torch.randn(2, heads[0], rows)
    *ref, ref_grads = losses(lambda *x: dense_attention(*x, visible), inputs, torch.float64, seen, grads)
    *low, low_grads = losses(lambda *x: dense_attention(*x, visible), inputs, BF16, seen, grads)
    *got, got_grads = losses(lambda *x: attend(*x, is_causal=True, kernel="cpu_fused"), inputs, BF16, seen, grads)
    for g, lo, r in zip([*got, *got_grads], [*low, *low_grads], [*ref, *ref_grads], strict=True):
        assert_close_to_reference(g, lo, r, 3.0)


@on_each_set
@needs_library
@pytest.mark.parametrize("size", [1000.0, -1000.0])
@pytest.mark.parametrize("rows", [2, 140])
def test_huge_scores_stay_finite(size, rows):
    query = torch.full((1, 2, rows, 16), size).to(BF16).requires_grad_()
    key = torch.randn(1, 1, 230, 16).sign().to(BF16).requires_grad_()
    value = torch.randn(1, 1, 230, 16).to(BF16).requires_grad_()
    out, lse = attend(query, key, value, scale=1.0, is_causal=True, kernel="cpu_fused")
    (out.float().sum() + lse.sum()).backward()
    for tensor in (out, lse, query.grad, key.grad, value.grad):
        assert tensor.isfinite().all()


@on_each_set
@needs_library
def test_many_heads_on_the_same_keys_are_not_too_many_rows():
    query, key, value = sharp_inputs(1, 40, 1, 30, 700, 16, dtype=BF16)  # 1200 rows a key head
    visible = visibility(30, 700, is_causal=True)
    ref, low = (dense_attention(*(x.to(d) for x in (query, key, value)), visible)[0] for d in (torch.float64, BF16))
    assert_close_to_reference(attend(query, key, value, is_causal=True, kernel="cpu_fused").out, low, ref)


@on_each_set
@needs_library
def test_the_shift_moves_when_later_scores_are_far_larger():
    """The maximum is guessed from the first keys: needles hundreds of powers of two above it must still win."""
    query, key, value = sharp_inputs(1, 2, 2, 150, 400, 32, dtype=BF16, sharpness=0.5)
    key[:, :, 161] = 40 * query[:, :, 30].sign()
    key[:, :, 333] = 80 * query[:, :, 77].sign()
    visible = torch.ones(1, 1, 150, 400, dtype=torch.bool)
    ref, ref_lse = dense_attention(query.double(), key.double(), value.double(), visible)
    low, low_lse = dense_attention(query, key, value, visible)
    assert ref_lse[0, :, 77].min() - ref_lse[0, :, 5].max() > 60  # past the limit of 2**60
    out, lse = attend(query, key, value, kernel="cpu_fused")
    assert_close_to_reference(out, low, ref)
    assert_close_to_reference(lse, low_lse, ref_lse)


@on_each_set
@needs_library
@pytest.mark.parametrize("rows", [2, 200])
def test_a_nan_reaches_the_rows_that_see_it_and_no_other(rows):
    query, key, value = sharp_inputs(1, 1, 1, rows, 900, 16, dtype=BF16)
    query[:, :, 1] = torch.nan
    out, lse = attend(query, key, value, is_causal=True, kernel="cpu_fused")
    assert out[0, 0, 1].isnan().all() and lse[0, 0, 1].isnan()
    others = torch.arange(rows) != 1
    assert out[0, 0, others].isfinite().all() and lse[0, 0, others].isfinite().all()


@on_each_set
@needs_library
@pytest.mark.parametrize("rows", [2, 200])
def test_keys_of_nan_are_not_taken_for_keys_unseen(rows):
    query, key, value = sharp_inputs(1, 1, 1, rows, 900, 16, dtype=BF16)
    key[:, :, :512] = torch.nan
    assert attend(query, key, value, kernel="cpu_fused").out.isnan().all()


@needs_library
def test_a_second_gradient_is_refused_rather_than_lost():
    query, key, value = (x.requires_grad_() for x in sharp_inputs(1, 1, 1, 40, 100, 16, dtype=BF16))
    out = attend(query, key, value, kernel="cpu_fused").out
    with pytest.raises(NotImplementedError, match="create_graph"):
        torch.autograd.grad(out.square().sum(), query, create_graph=True)


@needs_library
@pytest.mark.parametrize("rows", [4, 40])
@pytest.mark.parametrize("shape", [(2, 300), (3, 280)], ids=str)
def test_a_mask_of_another_shape_is_refused(rows, shape):
    query, key, value = sharp_inputs(3, 2, 2, rows, 300, 16, dtype=BF16)
    mask = Mask(key_padding=torch.ones(shape, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(1 or 3, 300\)"):
        attend(query, key, value, mask=mask, kernel="cpu_fused")


@on_each_set
@needs_library
def test_strided_inputs_and_any_number_of_threads_give_the_same_bits():
    query, key, value = (torch.randn(2, 170, 3, 32).to(BF16).transpose(1, 2) for _ in range(3))
    grad = torch.randn(2, 3, 170, 32).to(BF16).mT.contiguous().mT

    def everything(*inputs):
        leaves = [x.detach().requires_grad_() for x in inputs]
        out, lse = attend(*leaves, is_causal=True, kernel="cpu_fused")
        return [out, lse, *torch.autograd.grad([out, lse], leaves, [grad, torch.ones_like(lse)])]

    expected = everything(*(x.contiguous() for x in (query, key, value)))
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for a, b in zip(everything(query, key, value), expected, strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)
    flipped = query.mT.contiguous().mT  # elements of a row apart
    assert torch.equal(attend(flipped, key, value, is_causal=True, kernel="cpu_fused").out, expected[0])


@needs_library
@pytest.mark.parametrize("sizes", [(0, 5), (5, 0), (0, 0)], ids=str)
def test_nothing_to_attend(sizes):
    rows, keys = sizes
    shapes = ((2, 4, rows, 16), (2, 2, keys, 16), (2, 2, keys, 32))
    query, key, value = (torch.randn(shape).to(BF16).requires_grad_() for shape in shapes)
    out, lse = attend(query, key, value, is_causal=True, kernel="cpu_fused")
    assert out.shape == (2, 4, rows, 32) and (out == 0).all() and (lse == -torch.inf).all()
    for grad in torch.autograd.grad(out.sum(), (query, key, value)):
        assert (grad == 0).all()


@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [1, 20, 300])
def test_the_choice_can_be_compiled(dtype, rows):
    query, key, value = sharp_inputs(1, 4, 2, rows, 300, 32, dtype=dtype)
    function = lambda q, k, v: attend(q, k, v, is_causal=True)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(query, key, value), function(query, key, value), strict=True):
        assert torch.equal(a, b)


@needs_library
def test_one_node_for_the_compiler():
    query, key, value = (x.requires_grad_() for x in sharp_inputs(2, 4, 2, 100, 130, 32, dtype=BF16))
    padding = torch.arange(130)[None] >= torch.tensor([[20], [0]])
    function = lambda q, k, v: attend(q, k, v, mask=Mask(causal=True, key_padding=padding), kernel="cpu_fused")  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(compiled(query, key, value), function(query, key, value), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    grads = [
        torch.autograd.grad(f(query, key, value).out.float().sum(), (query, key, value)) for f in (compiled, function)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_sizes_in_python_are_those_in_c():
    defined = {}
    for source in Path(call.__file__).parent.joinpath("bfloat16").glob("*.[ch]"):
        found = {
            name: int(value) for name, value in re.findall(r"^#define (\w+) +(\d+)", source.read_text(), re.MULTILINE)
        }
        defined |= {f"{source.name}: {name}" if name in ("STEP", "TILE") else name: found[name] for name in found}
    assert (defined["MAX_DIM"], defined["MAX_ROWS"]) == (call.MAX_DIM, call.MAX_ROWS)
    for name, header in (("amx", "amx.h"), ("avx512_bf16", "vectors.h")):
        one = next(one for one in instruction_sets.SETS if one.name == name)
        assert (one.lanes, one.split_keys) == (16 * defined["VECTORS"], defined["SPLIT_KEYS"])
        assert one.walked == (defined[f"{header}: STEP"], defined[f"{header}: TILE"])


@needs_library
def test_the_struct_has_one_size_in_python_and_in_c(monkeypatch):
    call._checked.cache_clear()
    assert call.checked_library(BF16)[1].hf_call_size() == ctypes.sizeof(layout.CallStruct)

    class Longer(layout.CallStruct):
        _fields_ = [("more", ctypes.c_int64)]

    monkeypatch.setattr(call, "CallStruct", Longer)
    call._checked.cache_clear()
    with pytest.raises(RuntimeError, match=r"call\.h and layout\.py differ"):
        call.checked_library(BF16)
    call._checked.cache_clear()


REFUSED = {
    "float64": (dict(), torch.float64, 32, "float32, bfloat16 and float16"),
    "head_dim": (dict(), BF16, 24, "multiples of 16"),
    "predicate": (dict(mask=Mask(predicate=lambda b, h, q, k: k <= q)), BF16, 32, "predicate"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_named_it_never_falls_back(case):
    options, dtype, head_dim, message = REFUSED[case]
    query, key, value = sharp_inputs(1, 2, 2, 40, 40, head_dim, dtype=dtype)
    with pytest.raises(NotImplementedError, match=message):
        attend(query, key, value, kernel="cpu_fused", **options)


PROBE = """
import torch
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.kernels.cpu_fused import build as fused
from hf_attn_plugins.kernels.choose import choose
from hf_attn_plugins.core.mask import Mask
query = torch.randn(1, 2, 300, 32).to(torch.bfloat16)
out = attend(query, query, query, is_causal=True).out
kernel = choose(query, query, query, Mask(causal=True), None, 0.0).name
print(kernel, "|", fused.unavailable(), "|", bool(out.isfinite().all()))
"""


def probe(**environment):
    done = forks.run(PROBE, env={**os.environ, **environment}, timeout=120)
    assert done.returncode == 0, done.stderr
    kernel, reason, finite = (part.strip() for part in done.stdout.split("|"))
    assert finite == "True"
    return kernel, reason, done.stderr


@pytest.fixture
def compiler(tmp_path):
    """A compiler that takes no time: it copies the library that a real one has made."""
    script = tmp_path / "compiler"
    script.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && exit 0\nwhile [ "$1" != -o ]; do shift; done\n'
        f"exec cp '{library()._name}' \"$2\"\n"
    )
    script.chmod(0o755)
    return str(script)


@needs_library
def test_it_is_compiled_once_and_kept(tmp_path, compiler):
    assert probe(CC=compiler, XDG_CACHE_HOME=str(tmp_path))[:2] == ("cpu_fused", "None")
    (made,) = (tmp_path / "hf_attn_plugins").iterdir()
    first = made.stat()
    assert made.suffix == ".so" and stat.S_IMODE(made.parent.stat().st_mode) == 0o700
    assert probe(CC=compiler, XDG_CACHE_HOME=str(tmp_path))[0] == "cpu_fused"
    assert made.stat().st_mtime_ns == first.st_mtime_ns and len(list(made.parent.iterdir())) == 1
    made.write_bytes(b"cut short")
    assert probe(CC=compiler, XDG_CACHE_HOME=str(tmp_path))[0] == "cpu_fused"


@needs_library
def test_without_a_compiler_or_a_cache_attention_still_works(tmp_path, compiler):
    kernel, reason, said = probe(PATH=str(tmp_path), CC="")
    assert kernel != "cpu_fused" and "no C compiler" in reason and "off" not in said
    kernel, reason, _ = probe(HF_ATTN_PLUGINS_COMPILE="0")
    assert kernel != "cpu_fused" and "HF_ATTN_PLUGINS_COMPILE=0" in reason
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such option" >&2; exit 1\n')
    broken.chmod(0o755)
    kernel, reason, said = probe(CC=str(broken), XDG_CACHE_HOME=str(tmp_path))
    assert kernel != "cpu_fused" and "no such option" in reason and "no such option" in said
    assert not list((tmp_path / "hf_attn_plugins").iterdir())
    a_file = tmp_path / "file"
    a_file.touch()
    assert probe(CC=compiler, XDG_CACHE_HOME=str(a_file))[0] == "cpu_fused"  # in a folder of that process


def spoil_folder(cache, other):
    cache.chmod(0o770)


def spoil_for_everybody(cache, other):
    cache.chmod(0o707)


def link_folder(cache, other):
    cache.rename(other)
    cache.symlink_to(other)


@needs_library
@pytest.mark.parametrize("spoil", [spoil_folder, spoil_for_everybody, link_folder], ids=lambda f: f.__name__)
def test_a_folder_that_others_may_write_to_is_not_used(tmp_path, monkeypatch, caplog, spoil):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cache = tmp_path / "hf_attn_plugins"
    build._private.cache_clear()
    assert build._cache() == cache and not caplog.records
    spoil(cache, tmp_path / "elsewhere")
    used = [build._cache() for _ in range(3)]
    assert used[0] != cache and used[0] == used[2] and stat.S_IMODE(used[0].stat().st_mode) == 0o700
    assert len(caplog.records) == 1 and "mode 700" in caplog.text


def test_on_windows_the_cache_must_lie_in_the_users_profile(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(build.sys, "platform", "win32")
    monkeypatch.setattr(build.Path, "home", lambda: tmp_path / "user")
    for base, trusted in (("user/AppData", True), ("shared", False)):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / base))
        build._private.cache_clear()
        assert (build._cache() == tmp_path / base / "hf_attn_plugins") == trusted
    (tmp_path / "user" / "AppData" / "linked").symlink_to(tmp_path / "shared")
    assert not build._ours(tmp_path / "user" / "AppData" / "linked" / "hf_attn_plugins", stat.S_ISDIR)
    assert f"not in {tmp_path / 'user'}" in caplog.text
    build._private.cache_clear()


@needs_library
@pytest.mark.parametrize("how", ["link", "mode", "owner"])
def test_a_planted_library_is_not_loaded(tmp_path, monkeypatch, caplog, compiler, how):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    chosen = instruction_sets.best(BF16)
    made = build._built(compiler, chosen)
    good = made.read_bytes()
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    planted = tmp_path / "planted"
    planted.write_bytes(b"planted")
    if how == "link":
        made.unlink()
        made.symlink_to(planted)
    else:
        made.write_bytes(b"planted")
        if how == "mode":
            made.chmod(0o722)
        elif os.getuid() == 0:
            os.chown(made, 65534, -1)
        else:
            pytest.skip("only root can give a file away")
    again = build._built(compiler, chosen)
    assert again == made and not again.is_symlink() and len(again.read_bytes()) == len(good)
    assert planted.read_bytes() == b"planted" and "compiled anew" in caplog.text
    stamp = made.stat().st_mtime_ns
    assert build._built(compiler, chosen).stat().st_mtime_ns == stamp  # one that is ours is kept


def test_a_machine_without_the_instructions_is_told_so(monkeypatch):
    monkeypatch.setattr(build, "best", lambda dtype, most: instruction_sets.best.__wrapped__(dtype, most))
    monkeypatch.setattr(instruction_sets, "cpu_has", lambda feature: False)
    if instruction_sets.platform.machine() == "x86_64":
        assert "AVX512-BF16, AVX-512, AVX2" in unavailable()
        with pytest.raises(build.Unavailable, match="AVX512-BF16"):
            library()
