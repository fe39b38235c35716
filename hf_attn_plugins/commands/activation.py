"""The module that `hf-attn activate` copies into an environment, as `hf_attn_plugins_activation`.

A .pth file imports it at every start of Python, so it imports nothing but `sys`. It puts one finder in front of the
import system: when a program imports `transformers`, `hf_attn_plugins` is imported right after it. Programs that never
do so pay for this file only.
"""

import sys


class _Loader:
    def __init__(self, loader):  # type: ignore[no-untyped-def]
        self.loader = loader

    def create_module(self, spec):  # type: ignore[no-untyped-def]
        return self.loader.create_module(spec)

    def exec_module(self, module):  # type: ignore[no-untyped-def]
        module.__loader__ = module.__spec__.loader = self.loader  # as if nobody had been in between
        self.loader.exec_module(module)
        try:
            __import__("hf_attn_plugins")  # by name: once copied, this file is no part of the package
        except ModuleNotFoundError as error:
            if error.name != "hf_attn_plugins":  # else: uninstalled, and its activation was not taken back
                raise


class _Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name != "transformers":
            return None
        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not _Finder]
        for finder in sys.meta_path:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


if "transformers" not in sys.modules and _Finder not in sys.meta_path:
    sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]
