"""The wheel for Linux on x86-64: its C kernels run where there is no compiler, and no other file is taken for one."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from hf_attn_plugins.core.cpu import X86
from hf_attn_plugins.kernels.cpu_fused import build
from hf_attn_plugins.kernels.cpu_fused.instruction_sets import SETS, best
from tests.test_package import installed
from tests.wheel import ANY, FOLDER, built, compiled, platform_wheel

pytest.importorskip("build")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in X86 or build.unavailable(torch.float32) is not None,
    reason="x86-64 Linux with a C compiler and AVX2",
)

RUN = """
import os, re, shutil, sys
from pathlib import Path
import torch
from hf_attn_plugins.kernels import attend
from hf_attn_plugins.kernels.cpu_fused import build
from hf_attn_plugins.kernels.cpu_fused.instruction_sets import SETS, allowed, best
from hf_attn_plugins.testing import assert_close_to_reference, dense_attention, sharp_inputs

assert not any(map(shutil.which, build.COMPILERS)) and build.HERE.is_relative_to(sys.argv[1]), build.HERE
torch.set_num_threads(2)
visible = torch.ones(300, 300).tril().bool()


def ours(*inputs):
    return attend(*inputs, is_causal=True, kernel="cpu_fused").out


def dense(*inputs):
    return dense_attention(*inputs, visible)[0]


def with_gradients(function, inputs, dtype):
    leaves = [x.to(dtype).detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out.sum(), leaves)]


def threads():
    return len(os.listdir("/proc/self/task"))


loaded = set()
for dtype in (torch.float32, torch.bfloat16):
    inputs = [x.to(dtype) for x in sharp_inputs(2, 4, 2, 300, 300, 64, dtype=dtype)]
    torch.randn(1 << 22).exp()
    before = threads()
    ours(*inputs)
    assert threads() == before, "PyTorch's threads are used, and no others"
    chosen = best(dtype, allowed())
    loaded.add(chosen)
    assert build.library(chosen)._name == str(build.HERE / build.shipped_name(chosen))
    got, low = with_gradients(ours, inputs, dtype), with_gradients(dense, inputs, dtype)
    for i, reference in enumerate(with_gradients(dense, inputs, torch.float64)):
        assert_close_to_reference(got[i], low[i], reference, 3.0 if i else 2.0, f"result {i}")
mapped = set(re.findall(r"/.*/lib(?:gomp|iomp|omp)[-.\\w]*", Path("/proc/self/maps").read_text()))
assert {Path(each).parent for each in mapped} == {Path(torch.__file__).parent / "lib"}, mapped


def reason(chosen):
    build._state.cache_clear()
    return build.reason_against(chosen)


unused = next(one for one in SETS if one not in loaded)
(build.HERE / build.shipped_name(unused)).write_bytes(b"cut short")
assert "cannot be loaded (" in reason(unused) and "no C compiler" in reason(unused)
shipped = build.HERE / build.shipped_name(chosen)
os.environ[build.SWITCH] = "0"
assert reason(chosen) == "HF_ATTN_PLUGINS_COMPILE=0 is set"
del os.environ[build.SWITCH]
assert reason(chosen) is None
outside = shipped.rename(Path(sys.argv[1], "outside"))
shipped.symlink_to(outside)
assert "came without compiled ones" in reason(chosen), "a link out of the package"
outside.replace(shipped)
assert reason(chosen) is None
header = build.HERE / "call.h"
header.write_text(header.read_text() + "\\n")
assert "came without compiled ones" in reason(chosen), "a library of other sources"
header.unlink()
assert "call.h" in reason(chosen), "no sources"
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return next(built(tmp_path_factory.mktemp("wheel"), "--wheel").glob("*.whl"))


def run_installed(wheel: Path, place: Path, **environment: str) -> None:
    """Run the kernels of a wheel in a new environment, with no compiler in sight; nothing must be compiled."""
    python = installed(wheel, place / "venv")
    (place / "home").mkdir()
    clean = {"PATH": str(place / "venv" / "bin"), "HOME": str(place / "home"), **environment}
    command = [python, "-c", RUN, place / "venv"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=clean)
    assert done.returncode == 0, done.stderr
    assert not list((place / "home").rglob("*.so"))


def test_kernels_run_without_a_compiler(wheel, tmp_path):
    """With the libraries that this CPU takes, compiled with the flags of `make wheel` by other tests already."""
    chosen = {best(dtype) for dtype in (torch.float32, torch.bfloat16)}
    libraries = {build.shipped_name(one): Path(build.library(one)._name).read_bytes() for one in chosen}
    run_installed(platform_wheel(wheel, libraries), tmp_path)


@pytest.mark.slow
def test_the_wheel_of_a_release(wheel, tmp_path):
    """Every x86-64 instruction set; the rest as in the wheel for any platform; nothing asked of Linux but libgomp."""
    libraries = compiled()
    assert len(libraries) == sum(one.machine == X86 for one in SETS)
    made = platform_wheel(wheel, libraries)
    assert re.fullmatch(r"hf_attn_plugins-[\d.]+-py3-none-manylinux_2_2[0-8]_x86_64\.whl", made.name), "as PyTorch's"
    pure, whole = zipfile.ZipFile(wheel), zipfile.ZipFile(made)
    more = {f"{FOLDER}/{name}" for name in libraries}
    assert set(whole.namelist()) == set(pure.namelist()) | more
    same = [name for name in pure.namelist() if not name.endswith(("/WHEEL", "/RECORD"))]
    assert all(pure.read(name) == whole.read(name) for name in same)
    (about,) = (name for name in whole.namelist() if name.endswith(".dist-info/WHEEL"))
    assert b"Root-Is-Purelib: false" in whole.read(about) and ANY.encode() not in whole.read(about)
    for library in libraries.values():
        assert set(re.findall(rb"lib\w+\.so[.\d]*", library)) <= {b"libc.so.6", b"libm.so.6", b"libgomp.so.1"}
    for one in (each for each in SETS if best(each.dtypes[0], each.name) == each):
        place = tmp_path / one.name
        place.mkdir()
        run_installed(made, place, HF_ATTN_PLUGINS_INSTRUCTIONS=one.name)
