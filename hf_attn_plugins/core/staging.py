"""Files and folders that appear under their name whole or not at all, also where the process is killed half-way.

What is being written carries a hidden name with the machine and the process in it, so that a later run can tell what a
killed process has left, and remove it (`sweep`). Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = re.compile(r"\..*\.hf-attn\.(?P<host>[0-9a-f]{8})\.(?P<pid>[0-9]{1,10})\.[0-9a-f]{8}")
# As versions up to 0.1.0 named the files of a star cache.
OLD_NAME = re.compile(r"\.(tokens-\d+-\d+\.safetensors|star\.json)\.(?P<pid>[0-9]{1,10})\.tmp")


def staging_name(name: str) -> str:
    """A hidden name for what will be called `name`; two calls never give the same one."""
    return f".{name[:100]}.hf-attn.{_host()}.{os.getpid()}.{secrets.token_hex(4)}"


def is_staging(name: str) -> bool:
    """Whether a file or folder of this name is one of ours that is not finished."""
    return NAME.fullmatch(name) is not None


@contextlib.contextmanager
def staged_folder(name: str, beside: Path) -> Iterator[Path]:
    """An empty folder with a staging name in the folder `beside`; what is left of it at the end is removed."""
    stage = beside / staging_name(name)
    stage.mkdir(mode=0o700)
    try:
        with _locked(stage):
            yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def put(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a file under a staging name, then give it the name `path` in one step; it is on disk before."""
    temporary = path.with_name(staging_name(path.name))
    try:
        write(temporary)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep other processes that call this with the same folder out, where the file system has locks.

    Raises:
        OSError: another process is at work there.
    """
    with _locked(folder) as free:
        if not free:
            raise OSError(f"{folder}: another hf-attn is changing this folder, wait until it has ended.")
        yield


def sweep(folder: Path) -> list[Path]:
    """Remove what dead processes of this user on this machine have left half written in `folder`.

    Returns:
        what other machines have left or are writing: only a person can tell whether it is still needed.
    """
    foreign = []
    for path in sorted(folder.iterdir()):
        found = NAME.fullmatch(path.name) or OLD_NAME.fullmatch(path.name)
        if found is None:
            continue
        if found.groupdict().get("host", _host()) != _host():
            foreign.append(path)
        else:
            with contextlib.suppress(FileNotFoundError):  # another process was faster
                if _owned(path) and not _alive(int(found["pid"])):
                    _remove(path)
    return foreign


def _remove(path: Path) -> None:
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    with _locked(path) as free:  # a process of another container may have this number's name and be alive
        if free:
            shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """True while this process holds the folder's lock, or where there are no locks; False where another holds it."""
    if fcntl is None:
        yield True
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        free = True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            free = False
        except OSError:  # a file system without locks
            pass
        yield free
    finally:
        os.close(handle)


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _owned(path: Path) -> bool:
    return not hasattr(os, "getuid") or path.lstat().st_uid == os.getuid()


def _alive(pid: int) -> bool:
    if not hasattr(os, "getuid"):  # on Windows os.kill ends the process instead of asking for it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OverflowError, OSError):
        return True
    return True
