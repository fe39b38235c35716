"""The house: which layer imports which, what an import costs, and what an installed wheel contains."""

from __future__ import annotations

import ast
import shutil
import statistics
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "hf_attn_plugins"
METHODS = ("tiled", "star", "cqs", "indexed")
# The files that may know Transformers; everything else is about tensors and integers.
KNOW_TRANSFORMERS = {
    "registry.py",
    "interface.py",
    "structure.py",
    "switch.py",
    "support.py",
    "agreement.py",
    "checkpoint.py",
    "interception.py",
    "parallel_cache.py",
    "parallel_forward.py",
    "parallel_session.py",
    "star_cache.py",
    "star_pipeline.py",
    "indexed_config.py",
    "indexed_model.py",
}


def imports_of(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree)
    if top_level_only:
        nodes = (n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def is_from(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def test_the_ground_floor_imports_nothing_above_it():
    for path in (PACKAGE / "partial.py", PACKAGE / "masks.py"):
        ours = {n for n in imports_of(path) if is_from(n, "hf_attn_plugins")}
        assert ours <= {"hf_attn_plugins.partial"}, f"{path.name} imports {ours}"


def test_kernels_import_no_method():
    for path in files(PACKAGE / "kernels"):
        for name in imports_of(path):
            allowed = ("hf_attn_plugins.kernels", "hf_attn_plugins.masks", "hf_attn_plugins.partial")
            bench = path.name.startswith("triton_") and is_from(name, "hf_attn_plugins.commands")
            assert not is_from(name, "hf_attn_plugins") or any(is_from(name, a) for a in allowed) or bench, (
                f"kernels/{path.name} imports {name}"
            )
            assert not is_from(name, "transformers"), f"kernels/{path.name} imports {name}"


@pytest.mark.parametrize("method", METHODS)
def test_methods_import_no_transformers_and_no_other_method(method):
    above = ("interface", "structure", "switch", "support", "checkpoint", "eval", "patches", "parallel")
    for path in files(PACKAGE / method):
        command_line = path.name in ("command.py", "bench.py", "real_text.py")
        for name in imports_of(path):
            assert command_line or not is_from(name, "transformers"), f"{method}/{path.name} imports {name}"
            for other in (*above, *(m for m in METHODS if m not in (method, "tiled"))):
                assert not is_from(name, f"hf_attn_plugins.{other}"), f"{method}/{path.name} imports {name}"


def test_parallel_stands_on_methods_and_knows_no_transformers():
    above = ("interface", "structure", "switch", "support", "checkpoint", "eval", "patches", "commands")
    for path in files(PACKAGE / "parallel"):
        command_line = path.name in ("command.py", "bench.py")
        for name in imports_of(path):
            assert command_line or not is_from(name, "transformers"), f"parallel/{path.name} imports {name}"
            for other in above:
                assert command_line or not is_from(name, f"hf_attn_plugins.{other}"), (
                    f"parallel/{path.name} imports {name}"
                )


def test_only_named_files_know_transformers():
    for path in PACKAGE.glob("*.py"):
        if path.name not in KNOW_TRANSFORMERS:
            assert not any(is_from(n, "transformers") for n in imports_of(path)), f"{path.name} imports transformers"


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_touches_no_gpu_and_no_heavy_package():
    run_python(
        "import sys, torch, transformers\n"
        "before = set(sys.modules)\n"
        "import hf_attn_plugins\n"
        "new = set(sys.modules) - before\n"
        "assert 'triton' not in new and 'matplotlib' not in sys.modules and 'datasets' not in sys.modules, new\n"
        "assert 'transformers.modeling_utils' not in new, 'registration must wait for the modeling code'\n"
        "assert not torch.cuda.is_initialized()\n"
        "from transformers import AttentionInterface\n"
        "assert 'tiled_attention' in AttentionInterface._global_mapping\n"
        "assert not torch.cuda.is_initialized()\n"
    )


def test_import_costs_at_most_a_fifth():
    """CPU seconds of importing us on top of torch and transformers, measured inside the same fresh processes."""
    code = (
        "import time\n"
        "a = time.process_time(); import torch, transformers\n"
        "b = time.process_time(); import hf_attn_plugins\n"
        "c = time.process_time(); print((c - b) / (b - a))"
    )
    assert statistics.median(float(run_python(code)) for _ in range(3)) <= 0.2


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("build")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("hf_attn_plugins", "eval", "patches"):  # a copy: building leaves its own folders behind
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(target.glob("*.whl"))


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
        assert f"hf_attn_plugins/eval/report/{part}" in names, f"the report needs {part}"


def test_wheel_carries_the_data_that_the_code_reads(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, name in ((PACKAGE, "hf_attn_plugins"), (ROOT / "eval", "hf_attn_plugins/eval")):
        for path in folder.rglob("*"):
            if path.suffix in (".json", ".yaml", ".html", ".css", ".js") and "results" not in path.parts:
                assert f"{name}/{path.relative_to(folder).as_posix()}" in names


def test_wheel_works_in_a_clean_environment(wheel, tmp_path):
    """Installed without dependencies, beside the packages that are already there: every module, and the command."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, capture_output=True)
    python = venv / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True
    )
    Path(site.stdout.strip(), "theirs.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    subprocess.run(
        [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True, capture_output=True
    )
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


def test_readme_table_is_the_plugin_table():
    from hf_attn_plugins.commands.listing import markdown

    assert markdown() in (ROOT / "README.md").read_text(encoding="utf-8"), "run `make readme`"
