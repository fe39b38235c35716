"""`hf-attn run` is what python is: -m, -c, -u, a script, with the plugins registered; what cannot be is named."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
print(__name__, sys.argv[1:], "hf_attn_plugins" in sys.modules, __package__ in ("", None))
class Own: pass
import pickle; assert isinstance(pickle.loads(pickle.dumps(Own())), Own)
import helper
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "mymod.py").write_text(SCRIPT)
    (tmp_path / "helper.py").write_text("print('helped')")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__main__.py").write_text("import sys; print('package', sys.argv[1:]); sys.exit('bad')")
    (tmp_path / "broken.py").write_text("import no_such_module_here")
    return tmp_path


def hf_attn(folder, *words):
    command = [sys.executable, "-m", "hf_attn_plugins.cli", "run", "--", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder)


def python(folder, *words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=folder)


@pytest.mark.parametrize("words", [
    ["-m", "mymod", "--flag", "x"], ["-mmymod", "x"], ["mymod.py", "x"], ["-u", "mymod.py"], ["-u", "-m", "mymod"],
    ["-m", "package", "a"], ["-c", "import sys, helper; print(sys.argv); sys.exit(3)", "a", "-b"], ["-cprint(1)"],
    ["-c", "class A: pass\nimport pickle; pickle.dumps(A()); print(__name__)"],
])  # fmt: skip
def test_it_does_what_python_does(folder, words):
    wanted = python(folder, *words)
    prefix = ["/usr/bin/python3"] if words[0] == "-u" else ["python"] if words[0] == "mymod.py" else []
    found = hf_attn(folder, *prefix, *words)
    assert found.returncode == wanted.returncode, found.stderr
    assert found.stdout.replace(" True True", " False True") == wanted.stdout
    assert found.stderr == wanted.stderr


@pytest.mark.parametrize(("words", "message"), [
    (["-O", "mymod.py"], "-O cannot be set once Python runs"), (["python", "-W", "error", "mymod.py"], "-W cannot"),
    (["-m"], "-m needs a module name"), (["-c"], "-c needs code"), (["-m", "nonesuch"], "no module 'nonesuch'"),
    (["-X", "dev", "mymod.py"], "-X cannot"),
    (["-u"], "nothing to run"), (["nonesuch.py"], "no file or installed command"),
])  # fmt: skip
def test_what_is_refused_is_named(folder, words, message):
    found = hf_attn(folder, *words)
    assert found.returncode == 2 and message in found.stderr and len(found.stderr.splitlines()) == 1


@pytest.mark.parametrize("words", [["-m", "broken"], ["broken.py"], ["-c", "raise ValueError('mine')"]])
def test_an_error_of_the_program_s_own_is_its_traceback_and_status_1(folder, words):
    found, wanted = hf_attn(folder, *words), python(folder, *words)
    assert found.returncode == wanted.returncode == 1 and "Traceback" in found.stderr
    assert found.stderr.splitlines()[-1] == wanted.stderr.splitlines()[-1]
