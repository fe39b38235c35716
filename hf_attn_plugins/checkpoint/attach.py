"""First-layer tables in a live model: look-ups instead of the first layer's norm and projections, and back again."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

logger = logging.getLogger("hf_attn_plugins")
ATTRIBUTE = "hf_attn_first_layer"


@dataclass(frozen=True)
class Places:
    """Where in a model the tables act, as module paths.

    Attributes:
        decoder: the module that is called with token ids and owns the layers.
        embedding: the input embedding.
        norm: the norm before the first attention that only the projections read, or None where others read it too.
        projections: the first layer's query, key and value projections (fused ones count as one).
    """

    decoder: str
    embedding: str
    norm: str | None
    projections: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "projections": list(self.projections)}


class _Tokens(threading.local):
    """The token ids of the forward pass that this thread is in; None outside, and whenever tables must not be used."""

    now: Tensor | None = None

    def __reduce__(self) -> tuple[type[_Tokens], tuple[()]]:
        return _Tokens, ()


class FirstLayer:
    """Tables attached to one model by `attach`; `detach` undoes it."""

    def __init__(self, model: nn.Module, places: Places, tables: Mapping[str, Tensor]) -> None:
        self.decoder = model.get_submodule(places.decoder)
        self.embedding: Any = model.get_submodule(places.embedding)
        self.norm: Any = None if places.norm is None else model.get_submodule(places.norm)
        self.projections: list[Any] = [model.get_submodule(path) for path in places.projections]
        self.tokens = _Tokens()
        for projection, path in zip(self.projections, places.projections, strict=True):
            table = tables[path]
            wanted = (self.embedding.num_embeddings, projection.out_features)
            if tuple(table.shape) != wanted or table.dtype != projection.weight.dtype:
                raise ValueError(
                    f"the table of {path} is {tuple(table.shape)} {table.dtype}, the model needs {wanted} "
                    f"{projection.weight.dtype}."
                )
            table = table.to(projection.weight.device)
            projection.register_buffer("first_layer_table", table, persistent=False)
            projection.forward = partial(_project, projection, self.tokens)
        if self.norm is not None:
            self.norm.forward = partial(_normalise, self.norm, self.tokens)
        self.versions: list[int] | None = self._versions()
        self.hooks = (
            self.decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.decoder.register_forward_hook(self._leave, always_call=True),
        )

    def detach(self) -> None:
        """Put the model back as it was."""
        for hook in self.hooks:
            hook.remove()
        for projection in self.projections:
            del projection.forward, projection.first_layer_table
        if self.norm is not None:
            del self.norm.forward

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, whose parameters count versions anew: [] marks tables that are stale already."""
        return {**self.__dict__, "versions": None if self._versions() == self.versions else []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.versions is None:
            self.versions = self._versions()

    def _versions(self) -> list[int]:
        owners = [self.embedding, *self.projections, *([] if self.norm is None else [self.norm])]
        parameters = [parameter for owner in owners for parameter in owner.parameters(recurse=False)]
        return [-1 if parameter.is_inference() else parameter._version for parameter in parameters]

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if kwargs.get("inputs_embeds") is not None or not isinstance(ids, Tensor) or ids.is_floating_point():
            ids = None
        # Gradients need the projections themselves, and tables of weights that have changed since are wrong.
        if torch.is_grad_enabled() and any(p.weight.requires_grad for p in self.projections):
            ids = None
        if ids is not None and not torch.compiler.is_compiling() and self._versions() != self.versions:
            logger.warning("the weights have changed since the first-layer tables were made: computing without them.")
            ids = None
        self.tokens.now = ids

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.tokens.now = None


def _project(module: Any, tokens: _Tokens, hidden: Tensor) -> Tensor:
    ids = tokens.now
    if ids is None or hidden.shape[:-1] != ids.shape:
        return F.linear(hidden, module.weight, module.bias)
    return F.embedding(ids.to(module.first_layer_table.device), module.first_layer_table)


def _normalise(module: Any, tokens: _Tokens, hidden: Tensor) -> Tensor:
    ids = tokens.now
    if ids is None or hidden.shape[:-1] != ids.shape:
        return type(module).forward(module, hidden)
    return hidden


def attach(model: nn.Module, places: Places, tables: Mapping[str, Tensor]) -> FirstLayer:
    """Let a model look its first layer's projections up; the model's own weights stay where they are.

    The tables are used whenever the decoder is called with token ids and no gradient of the projections is wanted;
    calls with `inputs_embeds`, training, and calls after a weight has changed compute as before.

    Args:
        tables: by the paths of `places.projections`, each (vocabulary, out_features) in the projection's dtype.

    Raises:
        ValueError: tables are attached already, or one has another shape or dtype than the model needs.
        AttributeError: a path of `places` is not in this model.
    """
    if getattr(model, ATTRIBUTE, None) is not None:
        raise ValueError("first-layer tables are attached already: detach() them first.")
    layer = FirstLayer(model, places, tables)
    setattr(model, ATTRIBUTE, layer)
    return layer


def detach(model: nn.Module) -> None:
    """Undo `attach`; without effect on a model that has no tables."""
    layer = getattr(model, ATTRIBUTE, None)
    if layer is not None:
        layer.detach()
        delattr(model, ATTRIBUTE)
