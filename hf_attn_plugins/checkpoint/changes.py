"""What has changed in a model since first-layer tables were attached to it, as far as its structure tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from hf_attn_plugins.checkpoint import fingerprint
from hf_attn_plugins.core import compat


def reason(layer: Any, decoder: nn.Module) -> str | None:
    """Why the modules are not those of the tables, as far as their structure tells; None where nothing has changed.

    Args:
        layer: the `attach.FirstLayer`.
        decoder: the module that is called now, which holds the modules at `layer.paths`.
    """
    if compat.is_replica(decoder):
        return "the model runs as replicas (DataParallel)"
    for path, module in zip(layer.paths, layer.modules(), strict=True):
        try:
            now = decoder.get_submodule(path)
        except AttributeError:
            now = None
        if now is not module:
            return f"{path} was replaced, wrapped, moved or removed (adapters, quantisation, pruning)"
        if vars(module).get("forward") is not layer.forwards[module]:
            return f"the forward of {path} was replaced or wrapped"
        if compat.hooks_of(module):
            return f"{path} has hooks"
    if any(type(projection) is not nn.Linear for projection in layer.projections):
        return f"{layer.paths[-1]} or one beside it is no plain nn.Linear any more"
    if code_of(layer.norm) != layer.norm_code:
        return f"the code of {layer.paths[0]} was replaced"
    if fingerprint.settings(layer.norm) != layer.settings:
        return f"the settings of {layer.paths[0]} have changed (eps)"
    for i, projection in enumerate(layer.projections):
        table = projection.first_layer_table
        # Casts of the model (half, float) replace the tables' tensors: read a new one once, it may be rounded.
        if table is not layer.read[i]:
            if table.is_meta or int(fingerprint.tables_digest([table])[0]) != layer.digests[i]:
                return "the tables' own bits have changed (a cast of the model, meta tensors)"
            layer.read[i] = table
    return None


def code_of(module: nn.Module | None) -> tuple[Any, ...]:
    """A module's class and the class's forward: both can be replaced while the module stays."""
    return () if module is None else (type(module), type(module).forward)


def watched(decoder: nn.Module, paths: Sequence[str]) -> bool:
    """Whether somebody's code runs in the modules around those at `paths`: hooks, or a forward of the instance."""
    around = (decoder.get_submodule(path.rpartition(".")[0]) for path in paths)
    return any("forward" in vars(module) or compat.hooks_of(module) for module in around)
