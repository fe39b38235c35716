"""The compiled kernels on Windows and macOS: the flags, and what a computer with Linux can prove of them.

Windows: Debian's `gcc-mingw-w64-x86-64` compiles them, and `wine64` runs the AVX2 ones against the definition. macOS:
`$HF_ATTN_PLUGINS_ZIG` names a `zig` that compiles them for it; nothing is run. Neither says anything about speed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_attn_plugins.kernels.cpu_fused import build, call, instruction_sets
from hf_attn_plugins.kernels.cpu_fused.instruction_sets import ARM, SETS, STORED
from hf_attn_plugins.kernels.cpu_fused.systems import system
from hf_attn_plugins.testing import sharp_inputs, visibility
from tests.kernels import test_fused_arm as emulation
from tests.kernels.fused_cases import check_call, drawn, drawn_changes
from tests.kernels.test_attend import MASKS, as_mask

FOLDER = Path(call.__file__).parent
MINGW, WINE = "x86_64-w64-mingw32-gcc", shutil.which("wine64") or "/usr/lib/wine/wine64"
ZIG = os.environ.get("HF_ATTN_PLUGINS_ZIG", "")
needs_mingw = pytest.mark.skipif(not shutil.which(MINGW), reason=f"no {MINGW}")
AVX2 = next(one for one in SETS if one.name == "avx2")


def test_macos_takes_the_openmp_of_pytorch_or_one_thread(tmp_path):
    alone = system("darwin", tmp_path)
    assert alone.suffix == ".dylib" and alone.compilers[0] == "clang"
    assert "-fopenmp" not in alone.flags and not alone.libraries
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/libomp.dylib").touch()
    both = system("darwin", tmp_path)
    assert both.flags[-2:] == ("-Xpreprocessor", "-fopenmp")
    assert both.libraries == (str(tmp_path / "lib/libomp.dylib"), f"-Wl,-rpath,{tmp_path / 'lib'}")


def test_windows_and_linux():
    windows, linux = system("win32"), system("linux")
    assert (
        windows.suffix == ".dll" and "-Wa,-muse-unaligned-vector-move" in windows.flags and "-fPIC" not in windows.flags
    )
    assert linux.suffix == ".so" and {"-fPIC", "-fopenmp"} <= set(linux.flags)


def test_another_system_is_named_in_the_reason(monkeypatch):
    monkeypatch.setattr(sys, "platform", "sunos5")
    assert system() is None
    assert build._state.__wrapped__("avx2") == (None, "they are built on linux, darwin, win32, not on sunos5")


def test_amx_is_not_taken_on_windows(monkeypatch):
    import torch

    monkeypatch.setattr(instruction_sets, "cpu_has", lambda feature: True)
    monkeypatch.setattr(instruction_sets.platform, "machine", lambda: "AMD64")
    assert instruction_sets.best.__wrapped__(torch.bfloat16).name == "amx"
    monkeypatch.setattr(sys, "platform", "win32")
    assert instruction_sets.best.__wrapped__(torch.bfloat16).name == "avx512_bf16"


def sources(one) -> list[str]:
    return [str(source) for source in sorted((FOLDER / one.folder).glob("*.c"))]


@pytest.mark.slow
@needs_mingw
@pytest.mark.parametrize(
    "one", [one for one in SETS if one.machine != ARM and one.name != "amx"], ids=lambda one: one.name
)
def test_windows_compiles(one, tmp_path):
    made = tmp_path / "made.dll"
    command = [MINGW, *system("win32").flags, *one.flags, *sources(one), "-o", str(made)]
    subprocess.run(command, check=True, timeout=300)
    assert made.stat().st_size > 50_000


@pytest.mark.slow
@pytest.mark.skipif(not ZIG, reason="HF_ATTN_PLUGINS_ZIG is not set")
@pytest.mark.parametrize(
    "one", [one for one in SETS if one.name in ("avx2", "avx512", "neon")], ids=lambda one: one.name
)
def test_macos_compiles(one, tmp_path):
    made, there = tmp_path / "made.dylib", system("darwin", tmp_path)
    target = "aarch64-macos" if one.machine == ARM else "x86_64-macos"
    command = [ZIG, "cc", "-target", target, *there.flags, *one.flags, *sources(one), "-o", str(made)]
    subprocess.run(command, check=True, timeout=300)
    assert made.stat().st_size > 20_000


@pytest.fixture(scope="module")
def on_windows(tmp_path_factory):
    if not (shutil.which(MINGW) and Path(WINE).is_file()):
        pytest.skip(f"{MINGW} and wine64")
    folder = tmp_path_factory.mktemp("windows")
    flags = [flag for flag in system("win32").flags if flag != "-shared"]
    harness = str(Path(__file__).parent / "emulated_call.c")
    command = [MINGW, *flags, *AVX2.flags, f"-I{FOLDER}", harness, *sources(AVX2), "-o", str(folder / "call.exe")]
    subprocess.run(command, check=True, timeout=300)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WINEDEBUG", "-all")
        patch.setenv("WINEPREFIX", str(folder / "wine"))
        patch.setattr(emulation, "EMULATOR", WINE)
        emulated = emulation.Emulated(folder / "call.exe")
        patch.setattr(call, "_checked", lambda dtype, most: (AVX2, emulated))
        patch.setattr(call, "unavailable", lambda dtype: None)
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("on_windows")
@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_forward_gradients_and_decoding_on_windows(dtype, name):
    for shape in ((3, 590), (130, 201)):
        fields = MASKS[name](2, *shape)
        check_call(sharp_inputs(2, 4, 2, *shape, 32, 48, dtype=dtype), as_mask(fields), visibility(*shape, **fields))


@pytest.mark.slow
@pytest.mark.usefixtures("on_windows")
@pytest.mark.parametrize("dtype", STORED, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_fuzz_on_windows(dtype, seed):
    inputs, fields = drawn(seed, dtype)
    visible = visibility(inputs[0].shape[2], inputs[1].shape[2], **fields)
    check_call(inputs, as_mask(fields), visible, seed=seed, luck=3.0, **drawn_changes(seed, inputs))
