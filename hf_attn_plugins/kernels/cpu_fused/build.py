"""The C sources beside this file as a shared library: shipped in the wheel for Linux, else compiled on first use.

There is one library per instruction set (`instruction_sets.py`). The wheel for Linux on x86-64 has them in `compiled/`.
Otherwise the machine's compiler makes one, in a few seconds, once for every version of the sources and of the compiler,
and it is kept. Nothing is compiled at install. Without a library, or without one of the instruction sets, PyTorch's
operator or the tiles of `kernels.cpu` do the same work.
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

from hf_attn_plugins.core.files import cache_folder
from hf_attn_plugins.core.staging import put
from hf_attn_plugins.kernels.cpu_fused.instruction_sets import SETS, InstructionSet, allowed, best
from hf_attn_plugins.kernels.cpu_fused.systems import SYSTEMS, system

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
SWITCH = "HF_ATTN_PLUGINS_COMPILE"  # "0" turns the C kernels off: none is compiled, and no shipped one is loaded
SYSTEM = system()
COMPILERS, FLAGS, LIBRARIES, SUFFIX = SYSTEM or ((), (), (), "")
SECONDS = 120  # after which a compiler is given up


class Unavailable(RuntimeError):
    """The library cannot be had on this machine; the message says why."""


@torch.compiler.assume_constant_result
def unavailable(dtype: torch.dtype = torch.bfloat16) -> str | None:
    """None where kernels for `dtype` can run, else the reason why not. The first time, it loads or compiles them."""
    chosen = best(dtype, allowed())
    return chosen if isinstance(chosen, str) else reason_against(chosen)


def reason_against(chosen: InstructionSet) -> str | None:
    """None where the kernels of an instruction set of this CPU can run, else the reason why not; see `unavailable`."""
    return _state(chosen.name)[1]


def library(chosen: InstructionSet | None = None) -> ctypes.CDLL:
    """The loaded library of an instruction set; None takes the one for bfloat16.

    Raises:
        Unavailable: the CPU has no such instructions, or no library was shipped and there is no compiler that works.
    """
    found = best(torch.bfloat16, allowed()) if chosen is None else chosen
    if isinstance(found, str):
        raise Unavailable(found)
    loaded, reason = _state(found.name)
    if loaded is None:
        raise Unavailable(reason)
    return loaded


@functools.cache
def _state(name: str) -> tuple[ctypes.CDLL | None, str | None]:
    chosen = next(one for one in SETS if one.name == name)
    if system(sys.platform) is None:
        return None, f"they are built on {', '.join(SYSTEMS)}, not on {sys.platform}"
    if os.environ.get(SWITCH) == "0":
        return None, f"{SWITCH}=0 is set"
    lacking = "this package came without compiled ones"
    try:
        shipped = HERE / shipped_name(chosen)
        if _in_package(shipped):
            return ctypes.CDLL(str(shipped)), None
    except OSError as error:  # another system's, damaged, without an OpenMP runtime; or there are no sources
        lacking = f"those that came with this package cannot be loaded ({error})"
        logger.warning("hf_attn_plugins' fused CPU kernels: %s. They are compiled here, if possible.", lacking)
    compiler = next(filter(None, map(shutil.which, [os.environ.get("CC", ""), *COMPILERS])), None)
    if compiler is None:
        return None, f"there is no C compiler ({', '.join(COMPILERS)} or $CC), and {lacking}"
    try:
        return _loaded(compiler, chosen), None
    except (OSError, subprocess.SubprocessError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        reason = f"{compiler} could not build them ({said[-1] if said else error})"
        logger.warning("hf_attn_plugins' fused CPU kernels are off: %s. Slower ones are used instead.", reason)
        return None, reason


def shipped_name(chosen: InstructionSet) -> str:
    """Where the wheel for Linux has an instruction set's library, from this folder on.

    The name holds a digest of the sources and flags: a library of other sources is not found.
    """
    return f"compiled/{chosen.name}_{_digest(chosen)}.so"


def _in_package(path: Path) -> bool:
    """Whether a file is there and lies in this folder, links followed in both: installers may link every file."""
    found = path.resolve()
    return found.is_file() and found.is_relative_to(Path(__file__).resolve().parent)


def _digest(chosen: InstructionSet, *more: str) -> str:
    """20 hexadecimal digits for the sources of an instruction set, the flags, and `more`."""
    key = hashlib.sha256("\n".join([*more, *FLAGS, *chosen.flags]).encode())
    folder = HERE / chosen.folder
    shared = (HERE / name for name in ("call.h", "altered.h", "labels.h"))
    for source in sorted({*folder.glob("*.c"), *folder.glob("*.h"), *shared}):
        key.update(source.read_bytes())
    return key.hexdigest()[:20]


def _loaded(compiler: str, chosen: InstructionSet) -> ctypes.CDLL:
    path = _built(compiler, chosen)
    try:
        return ctypes.CDLL(str(path))
    except OSError:  # kept by another system, or cut short by a crash: once more
        path.unlink(missing_ok=True)
        return ctypes.CDLL(str(_built(compiler, chosen)))


def _built(compiler: str, chosen: InstructionSet) -> Path:
    """The library's file, compiled unless an earlier process has done so; complete or not there at all."""
    digest = _digest(chosen, _output(compiler, "--version"), *platform.libc_ver())
    path = _cache() / f"fused_{chosen.name}_{digest}{SUFFIX}"
    if not _ours(path, stat.S_ISREG):
        if os.path.lexists(path):
            logger.warning("%s is not a file that only this user can write: compiled anew.", path)
            path.unlink()
        put(path, lambda made: compile_library(compiler, chosen, made))
    return path


def compile_library(compiler: str, chosen: InstructionSet, library: Path, *more: str) -> None:
    """Compile the sources of an instruction set to a file; `more` are further options of the compiler."""
    folder = HERE / chosen.folder
    sources = [str(source) for source in sorted(folder.glob("*.c"))]
    _output(compiler, *FLAGS, *chosen.flags, *more, *sources, "-o", str(library), *LIBRARIES)
    library.chmod(0o700)


def _output(*command: str) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=SECONDS, check=True,
        env={**os.environ, "LC_ALL": "C"},
    )  # fmt: skip
    return done.stdout


def _ours(path: Path, kind: Callable[[int], bool]) -> bool:
    """Whether a path is a file or folder itself, no link to one, of this user, that nobody else may write to.

    Windows has no such owner and mode: there it must lie in the user's profile, which by default is that user's alone.
    """
    try:
        found = path.lstat()
    except FileNotFoundError:
        return False
    if sys.platform == "win32":
        return kind(found.st_mode) and path.resolve().is_relative_to(Path.home().resolve())
    return kind(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _cache() -> Path:
    """A folder of the user's own for what was compiled, or one for this process where there is none to be trusted.

    Whoever can write into it can run code as this user: it must be a folder itself, of this user, not writable for
    group or others.
    """
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _ours(folder, stat.S_ISDIR) and os.access(folder, os.W_OK):
            return folder
        why = (
            f"it is a link, or not in {Path.home()}"
            if sys.platform == "win32"
            else "it is a link, belongs to another user, or others may write to it"
        )
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
