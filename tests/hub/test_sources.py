"""What an exported kernel is made of: the closure of imports, relative, and no word of Transformers."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import subprocess
import sys

import pytest
import torch

from hf_attn_plugins.hub import sources
from hf_attn_plugins.hub.repository import ENTRY, INTERFACES, export
from hf_attn_plugins.kernels import attend


@pytest.fixture(scope="module")
def files():
    return sources.exported(ENTRY)


def test_only_core_and_kernels_with_the_c_sources(files):
    assert {path.split("/")[0] for path in files} == {"core", "kernels"}
    on_disk = {path.relative_to(sources.ROOT).as_posix() for path in (sources.ROOT / "kernels").rglob("*.[ch]")}
    assert {path for path in files if path.endswith((".c", ".h"))} == on_disk and on_disk


def test_every_import_is_relative_and_leads_to_a_file(files):
    for path, text in files.items():
        if not path.endswith(".py"):
            continue
        parents = path.split("/")[:-1]
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            assert node.level - 1 <= len(parents), f"{path}: above the exported folder"
            base = [*parents[: len(parents) - node.level + 1], *(node.module or "").split(".")]
            place = "/".join(part for part in base if part)
            assert f"{place}.py" in files or f"{place}/__init__.py" in files, f"{path} imports {place}"


def test_modules_beyond_core_and_kernels_are_refused():
    with pytest.raises(ValueError, match="only core and kernels"):
        sources.closure("hf.check")


def test_an_import_that_cannot_be_relative_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "ROOT", tmp_path)
    (tmp_path / "a.py").write_text("import hf_attn_plugins.core.mask\n")
    with pytest.raises(ValueError, match=r"a\.py, line 1: .* relatively"):
        sources.relative(tmp_path / "a.py")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "Our_Kernel"}, "lower case"),
        ({"version": 0}, "from 1"),
        ({"interface": "paged"}, "forward, varlen"),
        ({"results": sources.ROOT / "py.typed"}, "is no tiled.json"),
    ],
)
def test_bad_input_writes_no_metadata(tmp_path, options, said):
    with pytest.raises(ValueError, match=said):
        export(tmp_path / "made", **options)


def test_a_folder_that_holds_something_is_left_alone(tmp_path):
    (tmp_path / "mine").write_text("x")
    with pytest.raises(ValueError, match="not an empty folder"):
        export(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


LOADED = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("any_name", sys.argv[1] + "/__init__.py")
kernel = importlib.util.module_from_spec(spec); sys.modules["any_name"] = kernel; spec.loader.exec_module(kernel)
import torch
q, k, v = (torch.randn(1, heads, 300, 16, requires_grad=True) for heads in (4, 2, 2))
out, _ = kernel.flash_attn_forward(None, q, k, v, sliding_window=7)
out.sum().backward()
from any_name.kernels.choose import load
for name in ("aten", "cpu_tiled", "reference"): load(name)
theirs = [m for m in sys.modules if m.split(".")[0] in ("hf_attn_plugins", "transformers")]
assert not theirs, theirs
"""


def test_the_folder_loads_alone_without_this_package_and_transformers(tmp_path):
    made = export(tmp_path / "made")
    assert set(made.ids) == {"cpu", "cuda"}
    folder = tmp_path / "made" / "build" / "torch-cpu"
    subprocess.run([sys.executable, "-c", LOADED, str(folder)], check=True, timeout=120)


def test_two_exports_and_the_package_stand_side_by_side(tmp_path):
    q, k, v = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8), torch.randn(1, 2, 40, 8)
    wanted = attend(q, k, v, is_causal=True, window=5, kernel="cpu_tiled").out
    for interface, names in INTERFACES.items():
        made = export(tmp_path / interface, interface=interface)
        name = made.ids["cpu"]
        path = tmp_path / interface / "build" / "torch-cpu" / "__init__.py"
        spec = importlib.util.spec_from_file_location(name, path)
        kernel = importlib.util.module_from_spec(spec)
        sys.modules[name] = kernel
        try:
            spec.loader.exec_module(kernel)
            assert set(kernel.__all__) == set(names)
            run = sys.modules[f"{name}.kernels.attend"].attend
            assert torch.equal(run(q, k, v, is_causal=True, window=5, kernel="cpu_tiled").out, wanted)
            importlib.import_module(f"{name}.kernels.cpu_ops")
            assert hasattr(getattr(torch.ops, name), "tiled_forward"), "operators of its own"
        finally:
            for loaded in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
                del sys.modules[loaded]
    assert torch.equal(attend(q, k, v, is_causal=True, window=5, kernel="cpu_tiled").out, wanted)
