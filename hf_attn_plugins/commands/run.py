"""`hf-attn run -- CMD ...`: run any Python command in this process, with the plugins registered first.

For programs that take an attention name but know nothing of this package, such as
`hf-attn run -- lm_eval --model hf --model_args pretrained=P,attn_implementation=tiled_attention`.
"""

from __future__ import annotations

import argparse
import os
import runpy
import shutil
import sys

from hf_attn_plugins.hf.register import register


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument(
        "command",
        nargs=argparse.REMAINDER,
        help="-- then a script, 'python script.py', '-m module' or an installed Python command, and its arguments",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command as the main program; its exit status is ours.

    Raises:
        ValueError: no command, or one that is no Python program.
    """
    words = list(arguments.command)
    if words and words[0] == "--":
        words.pop(0)
    if words and os.path.basename(words[0]).startswith("python"):
        words.pop(0)
    if not words:
        raise ValueError("nothing to run: write hf-attn run -- COMMAND ...")
    register()
    try:
        if words[0] == "-m":
            if len(words) < 2:
                raise ValueError("-m needs a module name.")
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            path = _script(words[0])
            sys.argv = [path, *words[1:]]
            sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
            runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    return 0


def _script(word: str) -> str:
    path = word if os.path.isfile(word) else shutil.which(word)
    if path is None:
        raise ValueError(f"no file or installed command {word!r}.")
    with open(path, "rb") as file:
        first = file.readline()
    if not path.endswith(".py") and b"python" not in first:
        raise ValueError(f"{path} is no Python program: plugins can only be registered in Python.")
    return path
