"""First-layer tables in a live model: look-ups instead of the first layer's projections, and back again.

The norm before the projections computes as ever, so whoever reads its output (adapters, hooks) reads the true states.
A projection looks its result up only when it is given the very output of that norm, the norm's input is bit for bit the
embedded tokens that the tables were made from, and when norm and projections are bit for bit those of the tables
(`fingerprint`). Everything else computes, and says so once.
"""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_attn_plugins.checkpoint import changes, fingerprint, table_checks
from hf_attn_plugins.checkpoint.circumstances import circumstance
from hf_attn_plugins.checkpoint.places import Places
from hf_attn_plugins.core import compat

logger = logging.getLogger("hf_attn_plugins")
ATTRIBUTE = "hf_attn_first_layer"
BUFFERS = ("first_layer_rows", "first_layer_weights")
_numbers = itertools.count()
_compiled: set[int] = set()  # numbers of the layers whose compilation was warned of


class _Tokens(threading.local):
    """The forward pass that this thread is in: its token ids, and the states that were proved to be theirs."""

    now: Tensor | None = None  # None outside of a pass, and whenever tables must not be used
    states: Tensor | None = None
    version: int = 0
    digests: Tensor | None = None  # of the states, where something between norm and projections may write to them
    counted: bool = False

    def __reduce__(self) -> tuple[type[_Tokens], tuple[()]]:
        return _Tokens, ()


class FirstLayer:
    """Tables attached to one model by `attach`; `detach` undoes it.

    Attributes:
        looked_up: forward passes that used the tables.
        said: the reasons for which others did not; each was a warning, once.
    """

    def __init__(self, model: nn.Module, places: Places, tables: Mapping[str, Tensor]) -> None:
        self.decoder = model.get_submodule(places.decoder)
        self.embedding: Any = model.get_submodule(places.embedding)
        self.norm: Any = None if places.norm is None else model.get_submodule(places.norm)
        self.projections: list[Any] = [model.get_submodule(path) for path in places.projections]
        under = len(places.decoder) + 1 if places.decoder else 0
        paths = ([] if places.norm is None else [places.norm]) + list(places.projections)
        self.paths = [path[under:] for path in paths]
        table_checks.check_model(model, places)
        table_checks.check_tables(model, places, tables)
        if not all(key in tables for key in fingerprint.KEYS):
            tables = {**tables, **fingerprint.take(model, places, tables)}
        table_checks.check_fingerprints(places, tables)
        self.norm_code = changes.code_of(self.norm)
        self.number, self.tokens, self.looked_up, self.said = next(_numbers), _Tokens(), 0, set[str]()
        self.settings = int(tables[fingerprint.SETTINGS])
        self.digests = tables[fingerprint.TABLES].tolist()
        device = self.projections[0].weight.device
        for name, key in zip(BUFFERS, (fingerprint.ROWS, fingerprint.WEIGHTS), strict=True):
            self.projections[0].register_buffer(name, tables[key].to(device), persistent=False)
        for projection, path in zip(self.projections, places.projections, strict=True):
            table = tables[path].to(projection.weight.device)
            projection.register_buffer("first_layer_table", table, persistent=False)
        # Tables whose digest was compared.
        self.read: list[Tensor] = [projection.first_layer_table for projection in self.projections]
        self.before = {module: vars(module).get("forward") for module in self.modules()}
        for module in self.modules():
            run = _normalise if module is self.norm else _project
            module.forward = partial(run, self, module, self.before[module])
            # A replica shares its original's __dict__, so the forward of the original with the original's weights.
            compat.replicate_by(module, partial(_replica, module))
        self.forwards = {module: vars(module)["forward"] for module in self.modules()}
        self.hooks = (
            self.decoder.register_forward_pre_hook(self._enter, with_kwargs=True),
            self.decoder.register_forward_hook(self._leave, always_call=True),
        )

    def modules(self) -> list[Any]:
        """The norm, if any, and the projections."""
        return [*([] if self.norm is None else [self.norm]), *self.projections]

    def detach(self) -> None:
        """Put the model back as it was."""
        for hook in self.hooks:
            hook.remove()
        for module in self.modules():
            compat.replicate_by(module, None)
            if vars(module).get("forward") is self.forwards[module]:  # else somebody wrapped it: it goes on computing
                if self.before[module] is None:
                    del module.forward
                else:
                    module.forward = self.before[module]
            for name in ("first_layer_table", *BUFFERS):
                if hasattr(module, name):
                    delattr(module, name)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            _say_compiled(self.number)
            return
        self._leave()
        ids = kwargs.get("input_ids", args[0] if args else None)
        if kwargs.get("inputs_embeds") is not None or not isinstance(ids, Tensor) or ids.is_floating_point():
            return  # no tokens, nothing to look up: not a change that a warning is owed for
        reason = circumstance(ids, [self.embedding, *self.modules()]) or changes.reason(self, module)
        if reason is None:
            self.tokens.now = ids
        else:
            self._say(reason)

    def _leave(self, *_: Any) -> None:
        if not torch.compiler.is_compiling():
            self.tokens.now = self.tokens.states = self.tokens.digests = None
            self.tokens.counted = False

    def _say(self, reason: str) -> None:
        if reason not in self.said:
            self.said.add(reason)
            logger.warning("first-layer tables are not used, the projections are computed: %s.", reason)

    def prove(self, hidden: Tensor, output: Tensor) -> None:
        """Accept `output` as the states of this pass's tokens if `hidden` is what the tables' embedding gave them."""
        ids, self.tokens.now = self.tokens.now, None
        if ids is None or hidden.shape[:-1] != ids.shape:
            return
        if hidden.requires_grad or output.requires_grad:
            return self._say("a gradient is wanted of the states before the first layer's projections")
        first = self.projections[0]
        rows, weights = first.first_layer_rows, first.first_layer_weights
        if type(hidden) is not Tensor or not hidden.device == first.weight.device == rows.device == weights.device:
            return self._say("the first layer's states and weights are on several devices, or no plain tensors")
        if hidden.dtype != first.first_layer_table.dtype or output.dtype != hidden.dtype:
            return self._say(f"the states are {output.dtype}, the tables {first.first_layer_table.dtype}")
        now = fingerprint.weights_checksum(self.norm, self.projections)
        if now.shape != weights.shape or not torch.equal(now, weights):
            return self._say("the weights have changed since the first-layer tables were made")
        ids = ids.to(rows.device)
        known = ids.clamp(0, len(rows) - 1)
        same = (fingerprint.row_digests(hidden) == rows[known]) & (known == ids)
        if not bool(same.all()):
            return self._say(
                "the weights have changed since the first-layer tables were made, or something else changes the "
                "embedded tokens (hooks, new tokens, dropout)"
            )
        self.tokens.now, self.tokens.states, self.tokens.version = ids, output, compat.version_of(output)
        watched = changes.watched(self.decoder, self.paths[-len(self.projections) :])
        self.tokens.digests = fingerprint.row_digests(output) if watched else None

    def look_up(self, projection: Any, hidden: Tensor) -> Tensor | None:
        """The rows of the pass's tokens; None where the projection must be computed."""
        if self.norm is None and self.tokens.states is None:
            self.prove(hidden, hidden)
        ids, states = self.tokens.now, self.tokens.states
        if ids is None or states is None:
            return None
        same = hidden is states and compat.version_of(hidden) == self.tokens.version
        if same and self.tokens.digests is not None:  # `hidden.data.mul_(2)` leaves the version as it was
            same = torch.equal(fingerprint.row_digests(hidden), self.tokens.digests)
        if not same:
            self._say("the states are changed between the norm and the projections")
            return None
        if not self.tokens.counted:
            self.looked_up, self.tokens.counted = self.looked_up + 1, True
        return F.embedding(ids, projection.first_layer_table)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles. Dictionaries by module would be filled before the modules can be hashed: lists."""
        state = {**self.__dict__, "hooks": list(self.hooks), "norm_code": None}
        for name in ("before", "forwards"):
            state[name] = list(state[name].values())
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        for name in ("before", "forwards"):
            setattr(self, name, dict(zip(self.modules(), state[name], strict=True)))
        self.norm_code = changes.code_of(self.norm)


@torch.compiler.assume_constant_result
def _say_compiled(number: int) -> None:
    """A warning while a graph is traced: it is said then, and is no part of the graph."""
    if number not in _compiled:
        _compiled.add(number)
        logger.warning("first-layer tables are not used, the projections are computed: the model is compiled.")


def _compute(module: Any, before: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    if before is not None:
        return before(hidden, *args, **kwargs)
    return type(module).forward(module, hidden, *args, **kwargs)


def _project(layer: FirstLayer, module: Any, before: Any, input: Tensor) -> Any:
    rows = None if torch.compiler.is_compiling() else layer.look_up(module, input)
    return _compute(module, before, input) if rows is None else rows


def _normalise(layer: FirstLayer, module: Any, before: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
    output = _compute(module, before, hidden, *args, **kwargs)
    if not torch.compiler.is_compiling() and isinstance(output, Tensor):
        layer.prove(hidden, output)
    return output


def _replica(module: Any) -> Any:
    copied = compat.replica_of(module)
    vars(copied).pop("forward", None)
    return copied


def attach(model: nn.Module, places: Places, tables: Mapping[str, Tensor]) -> FirstLayer:
    """Let a model look its first layer's projections up; the model's own weights stay where they are.

    The tables are used whenever the decoder is called with token ids and everything they were made from is proved to be
    unchanged; other calls compute as before. The first call for each reason that is not used is a warning.

    Args:
        tables: by the paths of `places.projections`, each (vocabulary, out_features) in the projection's dtype; and
            what `fingerprint.take` found when they were made. Without it, tables are those of the model as it stands.

    Raises:
        ValueError: tables are attached already, one has another shape, dtype or digest than it should have, or the
            first layer is offloaded or no plain nn.Linear.
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
