"""`hf-attn activate`: the plugins' names in every program of this Python environment, without an import of its own."""

from __future__ import annotations

import argparse
import importlib.util
import os
import py_compile
import shutil
import sysconfig
from pathlib import Path

from hf_attn_plugins.core.staging import put

MODULE = "hf_attn_plugins_activation"
HOOK = Path(__file__).with_name("activation.py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """No options: the environment is that of the Python that runs this."""
    parser.description = (
        "Write two small files into this environment's site-packages, after which `import transformers` also registers "
        "the plugins: programs that never import hf_attn_plugins can then load checkpoints that name one. "
        "hf-attn deactivate removes them."
    )


def run(arguments: argparse.Namespace) -> None:
    """Write the files and say what they do and cost.

    Raises:
        ValueError: the folder cannot be written to.
    """
    folder = site_packages()
    if not os.access(folder, os.W_OK):
        raise ValueError(
            f"{folder} cannot be written to: use a virtual environment of your own, or import hf_attn_plugins in your "
            "program, or start it with hf-attn run -- COMMAND."
        )
    put(folder / f"{MODULE}.py", lambda path: shutil.copyfile(HOOK, path))
    py_compile.compile(str(folder / f"{MODULE}.py"), doraise=True)  # not at every start, where Python may not write it
    put(folder / f"{MODULE}.pth", lambda path: path.write_text(f"import {MODULE}\n", encoding="utf-8"))
    print(
        f"activated: {folder / MODULE}.pth\n"
        "Every Python of this environment now imports one small file at its start (below a millisecond). A program "
        "that imports transformers also imports hf_attn_plugins (some ten milliseconds; without torch).\n"
        "hf-attn deactivate takes it back: run it before you uninstall the package."
    )


def site_packages() -> Path:
    """Where this environment's packages lie and its .pth files are read."""
    return Path(sysconfig.get_path("purelib"))


def written() -> list[Path]:
    """The files of an activation that are there, the .pth first."""
    code = site_packages() / f"{MODULE}.py"
    paths = [code.with_suffix(".pth"), code, Path(importlib.util.cache_from_source(str(code)))]
    return [path for path in paths if path.is_file()]
