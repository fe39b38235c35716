"""Ctrl-C: status 130 and one line that says how to go on, while modules are imported and wherever it is swallowed."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from tests import forks
from tests.eval.tiny import model_folder

# Sends SIGINT to itself the moment a module is imported.
AT_IMPORT = """
import os, signal, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
from hf_attn_plugins.cli import main
sys.exit(main(sys.argv[1:]))
"""
# Sends SIGINT during the second answer; `how` decides what becomes of the KeyboardInterrupt.
IN_EVAL = """
import os, signal, sys
from hf_attn_plugins.eval import measure
answer, calls = measure.answer, []
def interrupted(*args, **kwargs):
    calls.append(None)
    if len(calls) == 2:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            for _ in range(1000): pass
        except KeyboardInterrupt:
            if {how!r} == "raised": raise
            if {how!r} == "another error": raise RuntimeError("operation failed")
    return answer(*args, **kwargs)
measure.answer = interrupted
from hf_attn_plugins.cli import main
status = main(sys.argv[1:])
print("calls", len(calls))
sys.exit(status)
"""


@pytest.fixture(autouse=True)
def interruptible():
    """SIGINT as a terminal has it: a process started in the background ignores it, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("module", ["torch", "transformers"])
def test_while_modules_are_imported(tmp_path, module):
    words = ["check", str(tmp_path), "--attn", "tiled_attention"]
    script = AT_IMPORT.format(module=module)
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=300)
    assert done.returncode == 130, done.stderr
    assert done.stderr.strip().splitlines() == ["hf-attn check: interrupted: run the same command again."]


def test_an_evaluation_ends_and_goes_on(tmp_path):
    words = [
        "eval",
        "--model",
        model_folder(tmp_path / "model"),
        "--attn",
        "sdpa,tiled_attention",
        "--dtype",
        "float32",
    ]
    words += ["--tasks", "niah_single_1", "--lengths", 512, "--samples", 2, "--max-new-tokens", 4, "--out"]
    for how in ("raised", "swallowed", "another error"):
        out = tmp_path / how.replace(" ", "-")
        done = forks.run(IN_EVAL.format(how=how), *words, out)
        assert done.returncode == 130, (how, done.stderr)
        last = done.stderr.strip().splitlines()[-1]
        assert last == "hf-attn eval: interrupted: run the same command to continue, with the same --out."
        assert (
            "Traceback" not in done.stderr and "operation failed" not in out.joinpath("predictions.jsonl").read_text()
        )
    done = forks.run("import sys; from hf_attn_plugins.cli import main; sys.exit(main(sys.argv[1:]))", *words, out)
    assert done.returncode == 0, done.stderr
    assert len(out.joinpath("predictions.jsonl").read_text().splitlines()) == 4


def test_the_handler_is_python_s_own_afterwards(monkeypatch, capsys):
    import signal

    from hf_attn_plugins.core import interrupt

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interrupt.remembered():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before and interrupt.asked()
    with pytest.raises(KeyboardInterrupt):
        interrupt.check()
    with interrupt.remembered():
        interrupt.check()
