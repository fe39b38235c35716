"""Run something right after a module was imported, without importing it: what keeps `import hf_attn_plugins` cheap."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def after_import(module: str, ready: str, callback: Callable[[], object]) -> None:
    """Call `callback` now if `module` already holds the attribute `ready`, else as soon as it has been imported."""
    if getattr(sys.modules.get(module), ready, None) is not None:
        callback()
    else:
        sys.meta_path.insert(0, _AfterImport(module, callback))


# Once the module on the left is there (it holds the attribute), the `register` of the module on the right is called.
REGISTRATIONS = (
    ("transformers.models.auto.configuration_auto", "AutoConfig", "hf_attn_plugins.indexed_config"),
    ("transformers.models.auto.modeling_auto", "AutoModel", "hf_attn_plugins.indexed_model"),
    ("transformers.quantizers.auto", "AutoHfQuantizer", "hf_attn_plugins.checkpoint.loader"),
)


def register_lazily() -> None:
    """Register our model, its config and the loader of first-layer tables when Transformers needs them. Idempotent."""
    for module, ready, ours in REGISTRATIONS:
        if not any(isinstance(finder, _AfterImport) and finder.module == module for finder in sys.meta_path):
            after_import(module, ready, _registration(ours))


def _registration(ours: str) -> Callable[[], object]:
    return lambda: importlib.import_module(ours).register()


class _AfterImport(MetaPathFinder):
    """Finds one module as the other finders do, adds the callback to its loader, and leaves `sys.meta_path`."""

    def __init__(self, module: str, callback: Callable[[], object]) -> None:
        self.module, self.callback = module, callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.module:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _CallingLoader(spec.loader, self.callback)
        return spec


class _CallingLoader(Loader):
    def __init__(self, loader: Loader, callback: Callable[[], object]) -> None:
        self.loader, self.callback = loader, callback

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.callback()
