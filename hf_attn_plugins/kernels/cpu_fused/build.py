"""The C sources beside this file as a shared library: compiled by the machine's compiler on first use, then kept.

It takes about a second, once for every version of the sources and of the compiler. Nothing is compiled at install, and
without a compiler, or without AVX512-BF16, the tiles of `kernels.cpu` do the same work.
"""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

from hf_attn_plugins.core.compat import cpu_has
from hf_attn_plugins.core.staging import put

logger = logging.getLogger(__name__)

SWITCH = "HF_ATTN_PLUGINS_COMPILE"  # "0" keeps the package from calling a compiler
COMPILERS = ("cc", "gcc", "clang")
FLAGS = (
    "-O3", "-std=gnu11", "-fPIC", "-shared", "-fopenmp", "-mavx2", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512dq",
    "-mavx512vl", "-mavx512bf16",
)  # fmt: skip
SECONDS = 120  # after which a compiler is given up


class Unavailable(RuntimeError):
    """The library cannot be had on this machine; the message says why."""


@torch.compiler.assume_constant_result
def unavailable() -> str | None:
    """None where the kernels can run, else the reason why not. Compiles them, the first time it is asked."""
    return _state()[1]


def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        Unavailable: no AVX512-BF16, no compiler, or one that failed.
    """
    loaded, reason = _state()
    if loaded is None:
        raise Unavailable(reason)
    return loaded


@functools.cache
def _state() -> tuple[ctypes.CDLL | None, str | None]:
    if not cpu_has("avx512_bf16"):
        return None, "this CPU has no AVX512-BF16 instructions"
    if sys.platform != "linux":
        return None, f"they are built on Linux only, not on {sys.platform}"
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH}=0 is set"
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CC", ""), *COMPILERS])), None)
    if compiler is None:
        return None, f"there is no C compiler ({', '.join(COMPILERS)} or $CC)"
    try:
        return _loaded(compiler), None
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = f"{compiler} could not build them ({said[-1] if said else error})"
        logger.warning("hf_attn_plugins' fused CPU kernels are off: %s. Slower ones are used instead.", reason)
        return None, reason


def _loaded(compiler: str) -> ctypes.CDLL:
    path = _built(compiler)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # kept by another system, or cut short by a crash: once more
        path.unlink(missing_ok=True)
        return ctypes.CDLL(str(_built(compiler)))


def _built(compiler: str) -> Path:
    """The library's file, compiled unless an earlier process has done so; complete or not there at all."""
    folder = Path(__file__).parent
    key = hashlib.sha256("\n".join([_output(compiler, "--version"), *platform.libc_ver(), *FLAGS]).encode())
    for source in sorted([*folder.glob("*.c"), *folder.glob("*.h")]):
        key.update(source.read_bytes())
    path = _cache() / f"fused_{key.hexdigest()[:20]}.so"
    if not _ours(path, stat.S_ISREG):
        if os.path.lexists(path):
            logger.warning("%s is not a file that only this user can write: compiled anew.", path)
            path.unlink()
        put(path, lambda made: _compile(compiler, folder, made))
    return path


def _compile(compiler: str, folder: Path, library: Path) -> None:
    sources = [str(source) for source in sorted(folder.glob("*.c"))]
    _output(compiler, *FLAGS, *sources, "-o", str(library), "-lm")
    library.chmod(0o700)


def _output(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=True,
        env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    return done.stdout


def _ours(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether a path is a file or folder itself, no link to one, of this user, that nobody else may write to."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    return kind(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _cache() -> Path:
    """A folder of the user's own for what was compiled, or one for this process where there is none to be trusted.

    Whoever can write into it can run code as this user: it must be a folder itself, of this user, not writable for
    group or others.
    """
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hf_attn_plugins"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _ours(folder, stat.S_ISDIR) and os.access(folder, os.W_OK):
            return folder
        why = "it is a link, belongs to another user, or others may write to it"
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home
        why = str(error)
    return _private(why)


@functools.cache
def _private(why: str) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hf_attn_plugins_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    logger.warning(
        "The cache of compiled kernels is not used (%s): they are compiled for this process alone. Make the folder "
        "hf_attn_plugins in $XDG_CACHE_HOME or ~/.cache yours, with mode 700.", why
    )  # fmt: skip
    return folder
