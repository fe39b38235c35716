"""`make wheel`: a release in a folder: the source archive, the wheel for any platform, and one for Linux on x86-64.

    python -m tests.wheel FOLDER

The last wheel has the files of the other one, and the C kernels compiled for every x86-64 instruction set.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hf_attn_plugins.core.cpu import X86
from hf_attn_plugins.kernels.cpu_fused import build
from hf_attn_plugins.kernels.cpu_fused.instruction_sets import SETS, InstructionSet

ROOT = Path(__file__).resolve().parent.parent
ANY = "py3-none-any"
FOLDER = "hf_attn_plugins/kernels/cpu_fused"
# log2 as of glibc 2.2.5, not 2.29, which added one that does not set errno: PyTorch's wheels run on glibc 2.28.
OLDER = '__asm__(".symver log2,log2@GLIBC_2.2.5");\n'


def built(place: Path, *words: str) -> Path:
    """The folder of what `python -m build` makes of a copy of this tree: building leaves its own folders behind."""
    source, target = place / "source", place / "dist"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("hf_attn_plugins", "eval", "patches"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "build", *words, "--no-isolation", "--outdir", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return target


def compiled() -> dict[str, bytes]:
    """Name in `cpu_fused` -> library, for every x86-64 instruction set; this CPU need not have them.

    The libraries need libgomp.so.1 and do not bring it. PyTorch's wheels bring one of this name and load it first, so
    the process has one OpenMP runtime, and kernels and PyTorch share its threads.

    Raises:
        FileNotFoundError: there is no gcc. Clang's libraries need another OpenMP runtime than PyTorch's.
        subprocess.CalledProcessError: gcc is older than 12.
    """
    gcc = shutil.which("gcc")
    if gcc is None:
        raise FileNotFoundError("gcc is needed to compile the kernels: install gcc 12 or newer.")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        older = Path(folder, "older.h")
        older.write_text(OLDER, encoding="utf-8")

        def library(chosen: InstructionSet) -> bytes:
            path = Path(folder, chosen.name)
            build.compile_library(gcc, chosen, path, "-s", "-include", str(older))
            return path.read_bytes()

        sets = [one for one in SETS if one.machine == X86]
        return dict(zip(map(build.shipped_name, sets), pool.map(library, sets), strict=True))


def platform_wheel(wheel: Path, libraries: Mapping[str, bytes]) -> Path:
    """Write a wheel for Linux on x86-64 beside the one for any platform, with libraries more; its path.

    The tag names the newest version of the C library of which a symbol is used (PEP 600).
    """
    with zipfile.ZipFile(wheel) as archive:
        members = [(info, archive.read(info)) for info in archive.infolist()]
    newest = max(int(minor) for each in libraries.values() for minor in re.findall(rb"GLIBC_2\.(\d+)\0", each))
    tag = f"py3-none-manylinux_2_{newest}_x86_64"
    date = members[0][0].date_time
    for name, library in libraries.items():
        info = zipfile.ZipInfo(f"{FOLDER}/{name}", date)
        info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o100755 << 16
        members.insert(0, (info, library))
    target = wheel.with_name(wheel.name.replace(ANY, tag))
    lines = []
    with zipfile.ZipFile(target, "w") as archive:
        for info, content in members:  # RECORD, which lists all others, is the last
            if info.filename.endswith(".dist-info/WHEEL"):
                content = content.replace(b"Purelib: true", b"Purelib: false").replace(ANY.encode(), tag.encode())
            if info.filename.endswith(".dist-info/RECORD"):
                content = "".join([*lines, f"{info.filename},,\n"]).encode()
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
            lines.append(f"{info.filename},sha256={digest},{len(content)}\n")
            archive.writestr(info, content)
    return target


def release(folder: Path) -> None:
    """Build all three into a folder; files of the same names there are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        made = built(Path(place))
        platform_wheel(next(made.glob("*.whl")), compiled())
        for path in sorted(made.iterdir()):
            print(shutil.copy(path, folder))


if __name__ == "__main__":
    release(Path(sys.argv[1]))
