"""`hf-attn activate`: names are registered without an import, programs that need none pay for one file, and undone."""

from __future__ import annotations

import subprocess
import sys

import pytest

from hf_attn_plugins.cli import main
from hf_attn_plugins.commands import activate

PROGRAM = """
import sys
print(*sorted({"torch", "transformers", "hf_attn_plugins"} & set(sys.modules)))
import transformers
print("hf_attn_plugins" in sys.modules, type(transformers.__spec__.loader).__name__, "torch" in sys.modules)
if "hf_attn_plugins" in sys.modules:
    from hf_attn_plugins.hf.import_hooks import is_waiting
    print(is_waiting("transformers.modeling_utils"))  # where registration happens
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(activate, "site_packages", lambda: tmp_path)
    monkeypatch.setattr("hf_attn_plugins.commands.deactivate.site_packages", lambda: tmp_path)
    return tmp_path


def start(folder, code):
    """Python with `folder` as one more place of packages whose .pth files are read."""
    first = f"import site; site.addsitedir({str(folder)!r})\n"
    return subprocess.run([sys.executable, "-c", first + code], capture_output=True, text=True)


def test_it_registers_in_programs_that_know_nothing_of_it(folder, capsys):
    assert main(["activate"]) == 0
    assert "millisecond" in capsys.readouterr().out
    done = start(folder, PROGRAM)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["", "True SourceFileLoader False", "True"]
    assert main(["deactivate"]) == 0 and capsys.readouterr().out.count("removed: ") == 3
    assert not [path for path in folder.rglob("*") if path.is_file()]
    assert main(["deactivate"]) == 0 and "nothing is activated" in capsys.readouterr().out


def test_a_program_without_transformers_pays_for_one_module_only(folder):
    main(["activate"])
    count = "import sys; print(len(set(sys.modules) - before), 'hf_attn_plugins_activation' in sys.modules)"
    code = f"import sys, site; before = set(sys.modules); site.addsitedir({str(folder)!r}); {count}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["1", "True"], done


def test_an_activation_that_outlives_the_package_is_silent(folder):
    main(["activate"])
    (folder / "transformers.py").write_text("print('loaded')")  # in place of the real one: this is about the finder
    gone = f"import sys; sys.modules['hf_attn_plugins'] = None; sys.path.insert(0, {str(folder)!r})\n"
    done = start(folder, gone + "import transformers; print(type(transformers.__loader__).__name__)")
    assert done.returncode == 0 and done.stdout.split() == ["loaded", "SourceFileLoader"] and done.stderr == "", done


def test_a_folder_that_cannot_be_written_to_is_named(folder, monkeypatch, capsys):
    monkeypatch.setattr(activate.os, "access", lambda *_: False)
    assert main(["activate"]) == 2
    assert "cannot be written to: use a virtual environment" in capsys.readouterr().err
    assert not list(folder.iterdir())
