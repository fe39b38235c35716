"""The files that an exported kernel is made of: found by following imports, rewritten to load under any name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

PACKAGE = "hf_attn_plugins"
ROOT = Path(__file__).resolve().parent.parent
ALLOWED = ("core", "kernels")
_SOURCES = {".c", ".h"}
_FROM = re.compile(rf"^(\s*from ){PACKAGE}((?:\.\w+)*)( import )", re.MULTILINE)


def exported(entry: str) -> dict[str, str]:
    """Path in the exported folder -> text, of a module, everything that it imports, and the C sources beside those.

    Imports of this package become relative ones, at every level, so that the folder loads under any module name.

    Args:
        entry: dotted name below the package, such as "kernels.hub_entry".

    Raises:
        ValueError: the module leads to one outside `core` and `kernels`, or an import cannot be made relative.
    """
    paths = closure(entry)
    files = {path.relative_to(ROOT).as_posix(): relative(path) for path in paths}
    for folder in sorted({path.parent for path in paths} - {ROOT}):
        for path in sorted(folder.rglob("*")):  # sources may have folders of their own
            if path.is_file() and path.suffix in _SOURCES:
                files[path.relative_to(ROOT).as_posix()] = path.read_text(encoding="utf-8")
    return dict(sorted(files.items()))


def closure(entry: str) -> list[Path]:
    """The files of a module, of all modules that it imports (lazy imports too), and of the folders they are in."""
    found: set[Path] = set()
    todo = [entry]
    while todo:
        name = todo.pop()
        parts = name.split(".")
        if parts[0] not in ALLOWED:
            raise ValueError(f"{PACKAGE}.{name} cannot be exported: only {' and '.join(ALLOWED)} know no Transformers.")
        for depth in range(1, len(parts) + 1):
            path = _file(parts[:depth])
            if path is not None and path not in found:
                found.add(path)
                todo += _imports(path)
    return sorted(found)


def relative(path: Path) -> str:
    """The text of a file of the package with imports of the package made relative."""
    text = path.read_text(encoding="utf-8")
    dots = "." * len(path.relative_to(ROOT).parts)
    text = _FROM.sub(lambda m: f"{m[1]}{dots}{m[2].removeprefix('.')}{m[3]}", text)
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        if any(name.split(".")[0] in (PACKAGE, "transformers") for name in names):
            raise ValueError(f"{path.name}, line {node.lineno}: {', '.join(names)} cannot be imported relatively.")  # type: ignore[attr-defined]
    return text


def _file(parts: list[str]) -> Path | None:
    """The file of a dotted name below the package; None where the last part is a name in a module."""
    place = ROOT.joinpath(*parts)
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


def _imports(path: Path) -> list[str]:
    """What a file imports of this package, as dotted names below it; "from a import b" gives a.b."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == PACKAGE:
            base = (node.module or "").split(".")[1:]
            found += [".".join([*base, alias.name]) for alias in node.names]
    return found
