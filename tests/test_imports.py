"""The house: imports fall from the top of `FLOORS` to its bottom, no two modules import each other, and none imports
through the front door of its own folder.

Imports are found by parsing, so lazy ones inside functions and those under TYPE_CHECKING count like any other.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TREES = {
    "hf_attn_plugins": ROOT / "hf_attn_plugins",
    "hf_attn_plugins.eval": ROOT / "eval",
    "hf_attn_plugins.patches": ROOT / "patches",
}
# From the top to the bottom. A module stands on the floor of its longest prefix here; "X.__init__" is the front door of
# folder X, which only floors above it may import. Folders on one floor do not import each other.
FLOORS = (
    ("hf_attn_plugins.eval.__main__",),
    ("hf_attn_plugins.__init__",),
    ("hf_attn_plugins.cli",),
    ("hf_attn_plugins.commands",),
    ("hf_attn_plugins.eval", "hf_attn_plugins.patches"),
    ("hf_attn_plugins.parallel.__init__", "hf_attn_plugins.tiled.__init__",
     "hf_attn_plugins.star.__init__", "hf_attn_plugins.cqs.__init__",
     "hf_attn_plugins.indexed.__init__", "hf_attn_plugins.kernels.__init__"),
    ("hf_attn_plugins.checkpoint",),
    ("hf_attn_plugins.parallel.hf",),
    ("hf_attn_plugins.star.hf", "hf_attn_plugins.indexed.hf"),
    ("hf_attn_plugins.hf.scan",),
    ("hf_attn_plugins.hf",),
    ("hf_attn_plugins.hf.calls", "hf_attn_plugins.hf.inputs"),
    ("hf_attn_plugins.hf.masks",),
    ("hf_attn_plugins.hf.models",),
    ("hf_attn_plugins.hf.compat",),
    ("hf_attn_plugins.parallel",),
    ("hf_attn_plugins.parallel.comm",),
    ("hf_attn_plugins.tiled", "hf_attn_plugins.star", "hf_attn_plugins.cqs", "hf_attn_plugins.indexed"),
    ("hf_attn_plugins.cqs.planning",),
    ("hf_attn_plugins.bench",),
    ("hf_attn_plugins.hub",),
    ("hf_attn_plugins.kernels.hub_entry",),
    ("hf_attn_plugins.kernels.varlen", "hf_attn_plugins.kernels.hub_masks"),
    ("hf_attn_plugins.kernels.attend_rectangles", "hf_attn_plugins.kernels.attend_blocks"),
    ("hf_attn_plugins.kernels.bound_attend",),
    ("hf_attn_plugins.kernels.attend",),
    ("hf_attn_plugins.kernels.choose",),
    ("hf_attn_plugins.kernels.on_device",),
    ("hf_attn_plugins.kernels.cpu.attend", "hf_attn_plugins.kernels.cpu_fused.attend", "hf_attn_plugins.kernels.aten",
     "hf_attn_plugins.kernels.triton", "hf_attn_plugins.kernels.flex", "hf_attn_plugins.kernels.reference"),
    ("hf_attn_plugins.kernels.cpu_ops",),
    ("hf_attn_plugins.kernels.cpu", "hf_attn_plugins.kernels.cpu_fused"),
    ("hf_attn_plugins.kernels.segment_labels", "hf_attn_plugins.kernels.rectangle_tables",
     "hf_attn_plugins.kernels.measured"),
    ("hf_attn_plugins.plugins",),
    ("hf_attn_plugins.testing",),
    ("hf_attn_plugins.core", "hf_attn_plugins.ui", "hf_attn_plugins._version"),
)  # fmt: skip
# Only here may Transformers be imported: folders by name.
KNOW_TRANSFORMERS = {"hf", "commands", "checkpoint", "eval", "patches"}


def modules_of(trees: dict[str, Path]) -> dict[str, Path]:
    """Dotted name -> file; a package's own file is "package.__init__"."""
    named = {}
    for package, folder in trees.items():
        for path in sorted(folder.rglob("*.py")):
            named[".".join([package, *path.relative_to(folder).with_suffix("").parts])] = path
    return named


def imported(path: Path, module: str) -> set[str]:
    """Every dotted name that a file imports, "from a import b" as a.b, relative ones made absolute."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")[: -node.level]
                base = ".".join([*parent, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def arrows(modules: dict[str, Path]) -> dict[str, set[str]]:
    """Module -> the modules of ours that it imports."""
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        found[module] = set()
        for name in imported(path, module):
            target = name
            while target and target not in modules and f"{target}.__init__" not in modules:
                target = target.rpartition(".")[0]
            if target:
                found[module].add(target if target in modules else f"{target}.__init__")
        found[module].discard(module)
    return found


def floor(module: str, floors: tuple[tuple[str, ...], ...]) -> tuple[int, str] | None:
    """(number of the floor, the folder on it) of a module, by its longest prefix; an empty __init__ has none."""
    best = None
    for number, folders in enumerate(floors):
        for folder in folders:
            if (module == folder or module.startswith(folder + ".")) and (best is None or len(folder) > len(best[1])):
                best = (number, folder)
    return best


def risen(graph: dict[str, set[str]], floors: tuple[tuple[str, ...], ...]) -> list[str]:
    """The imports that do not fall, as "a -> b"; an import inside one folder of a floor may go anywhere."""
    wrong = []
    for module, targets in graph.items():
        here = floor(module, floors)
        assert here is not None, f"{module} stands on no floor: add its folder to FLOORS"
        for target in sorted(targets):
            there = floor(target, floors)
            assert there is not None, f"{target} stands on no floor: add its folder to FLOORS"
            if there[0] < here[0] or (there[0] == here[0] and there[1] != here[1]):
                wrong.append(f"{module} -> {target}")
    return wrong


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of modules that import each other (strongly connected components of two or more)."""
    reach: dict[str, set[str]] = {}
    for module in graph:
        seen, todo = set(), [module]
        while todo:
            for target in graph[todo.pop()] - seen:
                seen.add(target)
                todo.append(target)
        reach[module] = seen
    found = [{other for other in reach[m] if m in reach[other]} for m in graph if m in reach[m]]
    return [circle for i, circle in enumerate(found) if circle not in found[:i]]


def offered(path: Path, package: str) -> set[str]:
    """The names that the front door of a folder binds, but for the folder's own modules; an empty one binds none."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module not in (package, "__future__", None):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def through_own_front_door(modules: dict[str, Path]) -> list[str]:
    """The imports of a front door by modules of its folder or below, as "module -> what it imports"."""
    doors = {
        package: names
        for module, path in modules.items()
        if module.endswith(".__init__") and (names := offered(path, package := module.removesuffix(".__init__")))
    }
    wrong = []
    for module, path in modules.items():
        inside = {package for package in doors if module.startswith(f"{package}.") and module != f"{package}.__init__"}
        for name in sorted(imported(path, module)):
            folder, _, last = name.rpartition(".")
            if name in inside or (folder in inside and (last == "*" or last in doors[folder])):
                wrong.append(f"{module} -> {name}")
    return wrong


@pytest.fixture(scope="module")
def house() -> dict[str, Path]:
    return modules_of(TREES)


def test_every_import_falls(house):
    assert risen(arrows(house), FLOORS) == []


def test_there_is_no_circle(house):
    assert circles(arrows(house)) == []


def test_nobody_imports_through_the_front_door_of_a_folder_it_is_in(house):
    """Such an import works only after the front door has been read to its end, whatever stands there."""
    assert through_own_front_door(house) == []


def test_transformers_is_known_in_its_places_only(house):
    strangers = [
        module
        for module, path in house.items()
        if any(name.split(".")[0] == "transformers" for name in imported(path, module))
        and not KNOW_TRANSFORMERS & set(module.split("."))
    ]
    assert strangers == []


def test_every_file_can_be_read_in_one_sitting(house):
    long = {module: n for module, path in house.items() if (n := path.read_text(encoding="utf-8").count("\n")) > 280}
    assert long == {}, "split what is longer than 280 lines"


@pytest.fixture
def small(tmp_path):
    """A made-up package: top imports middle imports bottom."""
    for name, text in {
        "__init__": "",
        "top/__init__": "",
        "top/a": "from pkg.middle.b import f\n",
        "middle/__init__": "",
        "middle/b": "def f():\n    from pkg.bottom import c\n    return c\n",
        "bottom/__init__": "",
        "bottom/c": "",
    }.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


SMALL = (("pkg.top",), ("pkg.middle",), ("pkg.bottom",), ("pkg",))


def test_the_made_up_house_stands(small):
    graph = arrows(modules_of({"pkg": small}))
    assert graph["pkg.middle.b"] == {"pkg.bottom.c"}, "lazy imports count"
    assert risen(graph, SMALL) == [] and circles(graph) == []


@pytest.mark.parametrize(
    "text",
    [
        "from pkg.middle.b import f\n",
        "import pkg.top.a\n",
        "def late():\n    from pkg.top import a\n",
        "from ..top import a\n",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from pkg.top.a import f\n",
    ],
)
def test_an_import_that_rises_is_found(small, text):
    (small / "bottom" / "c.py").write_text(text, encoding="utf-8")
    wrong = risen(arrows(modules_of({"pkg": small})), SMALL)
    assert len(wrong) == 1 and wrong[0].startswith("pkg.bottom.c -> pkg.")


def test_two_folders_of_one_floor_do_not_import_each_other(small):
    floors = (("pkg.top", "pkg.middle"), ("pkg.bottom",), ("pkg",))
    assert risen(arrows(modules_of({"pkg": small})), floors) == ["pkg.top.a -> pkg.middle.b"]


def test_a_circle_is_found(small):
    (small / "bottom" / "c.py").write_text("from pkg.bottom import d\n", encoding="utf-8")
    (small / "bottom" / "d.py").write_text("def f():\n    import pkg.bottom.c\n", encoding="utf-8")
    assert circles(arrows(modules_of({"pkg": small}))) == [{"pkg.bottom.c", "pkg.bottom.d"}]


@pytest.mark.parametrize(
    "text",
    [
        "from pkg.bottom import f\n",
        "from . import f\n",
        "from pkg.bottom import *\n",
        "from pkg import bottom\n",
        "import pkg.bottom\n",
        "import pkg.bottom as below\n",
        "import pkg.bottom.f as f\n",  # the function, although there is a module f, too
        "def late():\n    from ..bottom import f\n",
        "from pkg import g\n",
    ],
)
@pytest.mark.parametrize("inner", ["bottom/d", "bottom/deep/d"])
def test_an_import_through_the_own_front_door_is_found(small, text, inner):
    (small / "__init__.py").write_text("from pkg.bottom.c import g\n", encoding="utf-8")
    (small / "bottom" / "__init__.py").write_text("from pkg.bottom.f import f\n", encoding="utf-8")
    (small / "bottom" / "f.py").write_text("def f(): ...\n", encoding="utf-8")
    (small / "bottom" / "deep").mkdir()
    (small / "bottom" / "deep" / "__init__.py").write_text('"""Nothing but words."""\n', encoding="utf-8")
    (small / "middle" / "b.py").write_text("from pkg.bottom import f\n", encoding="utf-8")  # from outside
    assert through_own_front_door(modules_of({"pkg": small})) == []
    if inner == "bottom/deep/d":
        text = text.replace("from . ", "from .. ").replace("from ..bottom", "from ...bottom")
    (small / f"{inner}.py").write_text(text, encoding="utf-8")
    (wrong,) = through_own_front_door(modules_of({"pkg": small}))
    assert wrong.startswith(f"pkg.{inner.replace('/', '.')} -> pkg")


@pytest.mark.parametrize(
    "text",
    ["from pkg.bottom import c\n", "from . import c\n", "from pkg.bottom.f import f\n", "from pkg import middle\n"],
)
def test_a_module_of_the_own_folder_is_no_front_door(small, text):
    (small / "bottom" / "__init__.py").write_text("from . import c\nfrom pkg.bottom.f import f\n", encoding="utf-8")
    (small / "bottom" / "f.py").write_text("def f(): ...\n", encoding="utf-8")
    (small / "bottom" / "d.py").write_text(text, encoding="utf-8")
    assert through_own_front_door(modules_of({"pkg": small})) == []
