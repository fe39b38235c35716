"""Whether a model and first-layer tables fit each other: shapes, dtypes, fingerprints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.checkpoint import fingerprint
from hf_attn_plugins.checkpoint.places import Places


def check_model(model: nn.Module, places: Places) -> None:
    """ValueError unless the projections are plain matrices in memory."""
    for path in places.projections:
        projection: Any = model.get_submodule(path)
        if type(projection) is not nn.Linear:
            raise ValueError(f"{path} is a {type(projection).__name__}, tables replace a plain nn.Linear only.")
        if projection.weight.is_meta:
            raise ValueError(f"{path} is offloaded (meta tensors): keep the first layer in memory to use tables.")


def check_tables(model: nn.Module, places: Places, tables: Mapping[str, Tensor]) -> None:
    """ValueError unless tables and fingerprints fit the model and each other."""
    rows = getattr(model.get_submodule(places.embedding), "num_embeddings", None)
    for path in places.projections:
        if path not in tables:
            raise ValueError(f"there is no table for {path}: make the tables anew.")
        projection: Any = model.get_submodule(path)
        wanted, dtype = (rows, projection.out_features), projection.weight.dtype
        if tuple(tables[path].shape) != wanted or tables[path].dtype != dtype:
            raise ValueError(
                f"the table of {path} is {tuple(tables[path].shape)} {tables[path].dtype}, the model needs {wanted} "
                f"{dtype}."
            )


def check_fingerprints(places: Places, tables: Mapping[str, Tensor]) -> None:
    """ValueError unless the fingerprints are those of the tables."""
    found = [tables[path] for path in places.projections]
    given = [tables[key] for key in fingerprint.KEYS]
    if any(each.dtype != torch.int64 for each in given) or tables[fingerprint.ROWS].shape != (len(found[0]),):
        raise ValueError("the tables' fingerprints are malformed: make the tables anew.")
    if not torch.equal(fingerprint.tables_digest(found).cpu(), tables[fingerprint.TABLES].cpu()):
        raise ValueError("the tables are not those that were written (their digests differ): make them anew.")
