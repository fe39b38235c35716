"""How the C sources become a shared library on Linux, macOS and Windows: compilers, flags, OpenMP, file suffix."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import torch

COMMON = ("-O3", "-std=gnu11", "-ffp-contract=fast", "-shared")
SYSTEMS = ("linux", "darwin", "win32")  # `sys.platform`


class System(NamedTuple):
    """What a compiler is told on one system.

    Attributes:
        compilers: names that are looked up, the first is taken; $CC goes before them.
        flags: for every instruction set.
        libraries: what is linked, after the sources.
        suffix: of the library's file.
    """

    compilers: tuple[str, ...]
    flags: tuple[str, ...]
    libraries: tuple[str, ...]
    suffix: str


def system(platform: str | None = None, torch_folder: Path | None = None) -> System | None:
    """The row of a `sys.platform`, by default this one; None where the kernels are not built.

    Args:
        torch_folder: where PyTorch lies. Its wheels for macOS bring `lib/libomp.dylib`, and no header is needed: the
            sources have OpenMP's pragmas only. Without that file the kernels run in one thread.
    """
    platform = sys.platform if platform is None else platform
    if platform == "linux":
        return System(("cc", "gcc", "clang"), (*COMMON, "-fPIC", "-fopenmp"), ("-lm",), ".so")
    if platform == "darwin":
        folder = (Path(torch.__file__).parent if torch_folder is None else torch_folder) / "lib"
        openmp = folder / "libomp.dylib"
        if not openmp.is_file():
            return System(("clang", "cc"), (*COMMON, "-fPIC"), (), ".dylib")
        flags = (*COMMON, "-fPIC", "-Xpreprocessor", "-fopenmp")
        return System(("clang", "cc"), flags, (str(openmp), f"-Wl,-rpath,{folder}"), ".dylib")
    if platform == "win32":
        # GCC aligns the stack to 16 bytes there and still moves vectors as if it were aligned to 32: the assembler is
        # told to use moves for any address. Static: no DLL of the compiler's is needed beside the library.
        flags = (*COMMON, "-fopenmp", "-static", "-Wa,-muse-unaligned-vector-move")
        return System(("gcc", "x86_64-w64-mingw32-gcc"), flags, (), ".dll")
    return None
