"""What an import costs, and what an installed wheel contains; tests/test_imports.py holds the layers."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.wheel import built

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_attn_plugins"


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_touches_no_gpu_and_brings_little():
    """On top of torch and transformers: our own few files, nothing of anybody else's, no modeling code, no GPU."""
    run_python(
        "import sys, torch, transformers\n"
        "before = set(sys.modules)\n"
        "import hf_attn_plugins\n"
        "new = set(sys.modules) - before\n"
        "assert 'triton' not in new and 'matplotlib' not in sys.modules and 'datasets' not in sys.modules, new\n"
        "assert 'transformers.modeling_utils' not in new, 'registration must wait for the modeling code'\n"
        "ours = {name for name in new if name.split('.')[0] == 'hf_attn_plugins'}\n"
        "assert len(ours) <= 12, sorted(ours)\n"
        "others = {name.split('.')[0] for name in new - ours} - set(sys.stdlib_module_names)\n"
        "assert not others, others\n"
        "assert not torch.cuda.is_initialized()\n"
        "from transformers import AttentionInterface\n"
        "assert 'tiled_attention' in AttentionInterface._global_mapping\n"
        "assert not torch.cuda.is_initialized()\n"
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("build")
    return next(built(tmp_path_factory.mktemp("wheel"), "--wheel").glob("*.whl"))


def installed(wheel: Path, venv: Path) -> Path:
    """Python of a new environment: the wheel, and beside it the packages that are here; nothing is downloaded."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True, capture_output=True)
    python = venv / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip()
    theirs = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    Path(site, "theirs.pth").write_text("\n".join(theirs) + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(python)]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True)
    return python


def modules() -> set[str]:
    found = set()
    for folder, name in (
        (PACKAGE, "hf_attn_plugins"),
        (ROOT / "eval", "hf_attn_plugins.eval"),
        (ROOT / "patches", "hf_attn_plugins.patches"),
    ):
        for path in files(folder):
            parts = path.relative_to(folder).with_suffix("").parts
            found.add(".".join([name, *(p for p in parts if p != "__init__")]))
    return found


def test_wheel_has_every_module_and_nothing_loose(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert all(n.startswith(("hf_attn_plugins/", "hf_attn_plugins-")) for n in names), (
        "eval and patches must not be top level"
    )
    inside = {n.removesuffix(".py").replace("/", ".").removesuffix(".__init__") for n in names if n.endswith(".py")}
    assert inside == modules()
    for part in ("page.html", "page.css", "page.js", "samples.html"):
        assert f"hf_attn_plugins/eval/report/page/{part}" in names, f"the report needs {part}"


def test_wheel_carries_the_data_that_the_code_reads(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, name in ((PACKAGE, "hf_attn_plugins"), (ROOT / "eval", "hf_attn_plugins/eval")):
        for path in folder.rglob("*"):
            if path.suffix in (".json", ".yaml", ".html", ".css", ".js") and "results" not in path.parts:
                assert f"{name}/{path.relative_to(folder).as_posix()}" in names


def test_wheel_works_in_a_clean_environment(wheel, tmp_path):
    """Installed without dependencies, beside the packages that are already there: every module, and the command."""
    venv = tmp_path / "venv"
    python = installed(wheel, venv)
    code = (
        "import importlib, importlib.util, sys, pathlib, hf_attn_plugins\n"
        f"assert pathlib.Path(hf_attn_plugins.__file__).is_relative_to({str(venv)!r}), hf_attn_plugins.__file__\n"
        f"missing = [m for m in {sorted(modules())!r} if importlib.util.find_spec(m) is None]\n"
        "assert not missing, missing\n"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([venv / "bin" / "hf-attn", "list", "--json"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "tiled_attention" in done.stdout, done.stderr


WITHOUT = """
import sys
for name in ("datasets", "gguf", "kernels", "matplotlib", "rouge", "triton", "wonderwords"):
    sys.modules[name] = None  # as if it were not installed
import hf_attn_plugins as hap
from hf_attn_plugins.cli import main
assert hap.__version__ == sys.argv[1] and len(hap.plugins()) >= 3
for name in hap.__all__:
    getattr(hap, name)
for words in ("--version", "list", "plan tiled --length 6 --head-dim 3 --sram 24", "plan cqs --length 11 --workers 7",
              "plan star --length 40 --block-size 8", "patch list", "export-kernel kernel", "eval --help"):
    try:
        status = main(words.split())
    except SystemExit as end:
        status = end.code
    assert not status, words
"""


@pytest.mark.slow
def test_a_release_is_whole(wheel, tmp_path):
    """The source archive gives the wheel of this tree, which works outside of the tree and without the extras."""
    made = built(tmp_path)  # a source archive, and a wheel from that
    (found,), (archive,) = made.glob("*.whl"), made.glob("*.tar.gz")
    version = re.search(r'"(.+)"', (PACKAGE / "_version.py").read_text(encoding="utf-8").splitlines()[-1])[1]
    assert archive.name == f"hf_attn_plugins-{version}.tar.gz" and found.name.split("-")[1] == version
    here, there = (zipfile.ZipFile(path) for path in (wheel, found))
    assert sorted(here.namelist()) == sorted(there.namelist())
    assert all(here.read(n) == there.read(n) for n in here.namelist() if not n.endswith("/RECORD"))
    outside = tmp_path / "outside"
    outside.mkdir()
    python = installed(found, tmp_path / "venv")
    done = subprocess.run([python, "-c", WITHOUT, version], capture_output=True, text=True, cwd=outside)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_version_stands_in_one_place():
    from hf_attn_plugins import __version__

    assert not re.search(r"^version = \"", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert newest == __version__, "the changelog begins with this version"


def test_readme_table_is_the_plugin_table():
    from hf_attn_plugins.commands.list import markdown

    assert markdown() in (ROOT / "README.md").read_text(encoding="utf-8"), "run `make readme`"
