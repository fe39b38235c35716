"""A Python program in the time of a fork: it runs in a child of a server that has torch and Transformers imported.

A start of Python with these imports takes seconds. Use a process of its own where a test is about what an import does.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired
from typing import Any

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "torch",
        "transformers",
        "transformers.generation.utils",
        "transformers.models.llama.modeling_llama",
        "transformers.quantizers.auto",
        "accelerate",
        "hf_attn_plugins",
        "hf_attn_plugins.cli",
        "hf_attn_plugins.eval.command",
        "hf_attn_plugins.eval.running.runner",
        "hf_attn_plugins.parallel.hf.context_parallel",
        "tests.eval.words_in_memory",
        "tests.families",
        "tests.parallel.cases",
        "tests.parallel.cqs_cases",
    ]
)


def start(code: str, *words: object, output: Path, errors: Path, env: Mapping[str, str] | None = None) -> Any:
    """The process of `python -c code words...`, with its output and errors in files."""
    environment = dict(os.environ if env is None else env)
    arguments = (code, [str(word) for word in words], environment, os.getcwd(), str(output), str(errors))
    process = SERVER.Process(target=_program, args=arguments, daemon=True)
    process.start()
    return process


def run(code: str, *words: object, env: Mapping[str, str] | None = None, timeout: float = 300) -> CompletedProcess[str]:
    """What `subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)` returns."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder, "output"), Path(folder, "errors")
        process = start(code, *words, output=output, errors=errors, env=env)
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise TimeoutExpired("python -c", timeout, output.read_text(), errors.read_text())
        return CompletedProcess(list(words), process.exitcode, output.read_text(), errors.read_text())


def _program(code: str, words: list[str], environment: dict[str, str], folder: str, output: str, errors: str) -> None:
    for path, descriptor in ((output, 1), (errors, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in a terminal
    sys.argv = ["-c", *words]
    try:
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    finally:
        atexit._run_exitfuncs()  # multiprocessing ends its children without them
