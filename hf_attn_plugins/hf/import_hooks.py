"""Run something right after a module is imported: registration waits for Transformers' heavy parts."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from hf_attn_plugins.core.imports import is_being_imported


def when_imported(name: str, action: Callable[[], None]) -> None:
    """Call `action` now if module `name` is already imported, else once, right after it was."""
    module = sys.modules.get(name)
    if module is not None and not is_being_imported(module):
        action()
        return
    forget(name)
    sys.meta_path.insert(0, _After(name, action))


def forget(name: str) -> None:
    """Drop the action that waits for module `name`, if there is one."""
    sys.meta_path[:] = [f for f in sys.meta_path if not (isinstance(f, _After) and f.name == name)]


def is_waiting(name: str) -> bool:
    """Whether an action waits for module `name`."""
    return any(isinstance(finder, _After) and finder.name == name for finder in sys.meta_path)


class _After(MetaPathFinder):
    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.action)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Loader, action: Callable[[], None]) -> None:
        self.loader, self.action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.action()
