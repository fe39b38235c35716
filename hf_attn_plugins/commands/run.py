"""`hf-attn run -- CMD ...`: run any Python command in this process, with the plugins registered first.

For programs that take an attention name but know nothing of this package, such as
`hf-attn run -- lm_eval --model hf --model_args pretrained=P,attn_implementation=tiled_attention`.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import runpy
import shutil
import sys
import traceback
import types
from collections.abc import Callable

from hf_attn_plugins.hf.register import register

ALLOWED = "-m MODULE, -c CODE, -u and -X utf8 before them, a script, or an installed Python command"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "command",
        nargs=argparse.REMAINDER,
        help="-- then a script, 'python [-u] script.py', '-m module', '-c code' or an installed Python command, and "
        "its arguments",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command as the main program, as `python` does; its exit status is ours.

    Raises:
        ValueError: no command, one that is no Python program, or a flag of python that cannot be set any more.
    """
    words = list(arguments.command)
    if words and words[0] == "--":
        words.pop(0)
    if words and os.path.basename(words[0]).startswith("python"):
        words.pop(0)
    while words and words[0] in ("-u", "-X"):
        _flag(words)
    if not words:
        raise ValueError("nothing to run: write hf-attn run -- COMMAND ...")
    register()
    if words[0].startswith("-") and words[0][:2] not in ("-m", "-c"):
        raise ValueError(
            f"python's {words[0]} cannot be set once Python runs: hf-attn run takes {ALLOWED}. Set its environment "
            "variable (PYTHONOPTIMIZE, PYTHONWARNINGS, ...) instead."
        )
    register()
    try:
        if words[0][:2] in ("-m", "-c"):
            _module_or_code(words)
        else:
            path = _script(words[0])
            sys.argv = [words[0] if os.path.isfile(words[0]) else path, *words[1:]]
            sys.path.insert(0, os.path.dirname(os.path.realpath(path)))
            _as_main(lambda: runpy.run_path(path, run_name="__main__"))
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    return 0


def _flag(words: list[str]) -> None:
    flag = words.pop(0)
    if flag == "-X":
        if not words or words.pop(0) not in ("utf8", "utf8=1") or not sys.flags.utf8_mode:
            raise ValueError("python's -X cannot be set once Python runs: set PYTHONUTF8=1 and the like instead.")
        return
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(write_through=True)


def _module_or_code(words: list[str]) -> None:
    flag, joined = words[0][:2], words[0][2:]  # python takes `-mpdb` and `-m pdb`
    rest = [joined, *words[1:]] if joined else words[1:]
    if not rest:
        raise ValueError(f"{flag} needs {'a module name' if flag == '-m' else 'code'}.")
    sys.argv = [flag, *rest[1:]]
    if flag == "-m":
        sys.path.insert(0, os.getcwd())
        if _missing(rest[0]):
            raise ValueError(f"no module {rest[0]!r} to run in {os.getcwd()} or among the installed ones.")
        _as_main(lambda: runpy.run_module(rest[0], run_name="__main__", alter_sys=True))
        return
    sys.path.insert(0, "")
    main, ours = types.ModuleType("__main__"), sys.modules["__main__"]
    sys.modules["__main__"] = main  # pickle looks the code's own classes up there
    try:
        _as_main(lambda: exec(compile(rest[0], "<string>", "exec"), main.__dict__))
    finally:
        sys.modules["__main__"] = ours


def _as_main(work: Callable[[], object]) -> None:
    """Run the program; an error of its own ends in its traceback and status 1, not in a line of ours."""
    try:
        work()
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None


def _missing(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is None
    except ModuleNotFoundError as error:
        if error.name is not None and (module + ".").startswith(error.name + "."):
            return True
        raise
    except ValueError:  # a module without a spec, such as __main__
        return False


def _script(word: str) -> str:
    path = word if os.path.isfile(word) else shutil.which(word)
    if path is None:
        how = ': pip install "hf-attn-plugins[lm-eval]" brings it' if word == "lm_eval" else ""
        raise ValueError(f"no file or installed command {word!r}{how}.")
    with open(path, "rb") as file:
        first = file.readline()
    if not path.endswith(".py") and b"python" not in first:
        raise ValueError(f"{path} is no Python program: plugins can only be registered in Python.")
    return path
