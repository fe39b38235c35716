"""Checksums of what first-layer tables are made from, over all its bits: cheap enough to be taken at every forward.

Version counters and addresses prove nothing: `weight.data += x` changes neither. Only the memory itself tells. Sums of
integers are the same on every device and in every order, so checksums travel with the tables' file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hf_attn_plugins.checkpoint.places import Places

KEYS = ("fingerprint.rows", "fingerprint.weights", "fingerprint.tables", "fingerprint.settings")
ROWS, WEIGHTS, TABLES, SETTINGS = KEYS
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _bits(tensor: Tensor, widest: int) -> Tensor:
    """The same memory as integers of at most `widest` bytes; only the last dimension changes its length."""
    tensor = tensor.detach().contiguous()
    row = tensor.shape[-1] * tensor.element_size()
    size = next(s for s in (8, 4, 2, 1) if s <= widest and row % s == 0)
    return tensor.view(INTEGERS[size])


def checksum(tensor: Tensor) -> Tensor:
    """The sum of every column and of every row of a tensor's bits.

    Columns are summed in lanes of 64 bits, rows in lanes of 32 bits with 64-bit sums: a change of signs alone could
    cancel in the 64-bit lanes, where the sign is the highest bit, and a swap would cancel in one of the two sums.

    Returns:
        int64, 1-D: (columns in lanes of 8 bytes) + (rows) elements.
    """
    if tensor.ndim < 2:
        tensor = tensor.reshape(1, -1)
    return torch.cat([_bits(tensor, 8).sum(0, dtype=torch.int64), _bits(tensor, 4).sum(1, dtype=torch.int64)])


@lru_cache(maxsize=8)
def _factors(count: int, device: torch.device) -> Tensor:
    """(count,) fixed pseudo-random int64, the same in every version of PyTorch: the mixing steps of splitmix64."""
    with torch.inference_mode(False):
        mixed = (torch.arange(1, count + 1) * -7046029254386353131).clone()
        for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
            mixed = (mixed ^ (mixed >> shift)) * factor
        return (mixed ^ (mixed >> 31)).to(device)


def row_digests(states: Tensor) -> Tensor:
    """One number for each row of bits: the sum of its 32-bit lanes, each times a fixed random factor, modulo 2**64.

    Args:
        states: (..., width).

    Returns:
        (...) int64.
    """
    bits = _bits(states, 4)
    return (bits * _factors(bits.shape[-1], bits.device)).sum(-1)


def weights_of(norm: nn.Module | None, projections: Sequence[Any]) -> list[Tensor]:
    """Every tensor that stands between the embedded tokens and the projections' outputs, in a fixed order."""
    of_norm = [] if norm is None else [*norm.parameters(), *norm.buffers()]
    return [*of_norm, *(t for p in projections for t in (p.weight, p.bias) if t is not None)]


def weights_checksum(norm: nn.Module | None, projections: Sequence[Any]) -> Tensor:
    """The checksums of norm and projections, joined: int64, 1-D."""
    return torch.cat([checksum(tensor) for tensor in weights_of(norm, projections)])


def settings(norm: nn.Module | None) -> int:
    """56 bits of a hash over the norm's class name and its numbers (eps and the like)."""
    if norm is None:
        return 0
    numbers = {k: v for k, v in vars(norm).items() if isinstance(v, (int, float, str)) and k[0] != "_"}
    numbers.pop("training", None)
    name = type(norm).__name__
    return int.from_bytes(hashlib.sha256(json.dumps([name, numbers], sort_keys=True).encode()).digest()[:7], "big")


def tables_digest(tables: Sequence[Tensor]) -> Tensor:
    """(tables,) int64, one number for each table."""
    return torch.stack([row_digests(checksum(table)) for table in tables])


class _Stop(Exception):
    """Ends a trial run once the module in question has been reached."""


def inputs(model: nn.Module, path: str, ids: Tensor) -> Tensor:
    """What the module at a path is given for ids (B, T): (B, T, width); what comes after it is not run."""
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        caught.append(args[0])
        raise _Stop

    hook = model.get_submodule(path).register_forward_pre_hook(catch)
    try:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except _Stop:
        pass
    finally:
        hook.remove()
    return caught[0].unflatten(0, ids.shape) if caught[0].ndim == 2 else caught[0]


@torch.no_grad()
def take(model: nn.Module, places: Places, tables: Mapping[str, Tensor], batch: int = 1024) -> dict[str, Tensor]:
    """What proves later that embedding, norm, projections and tables are still these.

    Args:
        tables: by the paths of `places.projections`.

    Returns:
        on the CPU, int64: ROWS (vocabulary,), a digest of each token's embedded state; WEIGHTS (lanes,); TABLES
        (projections,); SETTINGS, a scalar.
    """
    embedding: Any = model.get_submodule(places.embedding)
    norm = None if places.norm is None else model.get_submodule(places.norm)
    projections = [model.get_submodule(path) for path in places.projections]
    digests: list[Tensor] = []
    for start in range(0, embedding.num_embeddings, batch):
        ids = torch.arange(start, min(start + batch, embedding.num_embeddings), device=embedding.weight.device)
        embedded = inputs(model, places.norm or places.projections[0], ids.unsqueeze(1))[:, 0]
        digests.append(row_digests(embedded).cpu())
    return {
        ROWS: torch.cat(digests),
        WEIGHTS: weights_checksum(norm, projections).cpu(),
        TABLES: tables_digest([tables[path] for path in places.projections]).cpu(),
        SETTINGS: torch.tensor(settings(norm)),
    }
