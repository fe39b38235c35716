"""`context_parallel`: one long prompt on all processes of an `accelerate launch`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn

from hf_attn_plugins import _version
from hf_attn_plugins.core.options import OfLayer
from hf_attn_plugins.hf.check import check
from hf_attn_plugins.hf.configure import use
from hf_attn_plugins.hf.models.unwrap import language_model
from hf_attn_plugins.hf.register import installed
from hf_attn_plugins.parallel.comm.consistency import agree, same_random_state
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.hf.session import Session
from hf_attn_plugins.parallel.hf.weights import (
    check_device,
    is_sharded,
    refuse_deepspeed,
    refuse_placement,
    tensor_part,
)
from hf_attn_plugins.parallel.link import least_turn_of
from hf_attn_plugins.parallel.method import Method, method_for
from hf_attn_plugins.plugins import Plugin, plugin
from hf_attn_plugins.star.hf.fingerprint import fingerprint
from hf_attn_plugins.star.hf.model import check_model, text_config


@contextlib.contextmanager
def context_parallel(
    model: nn.Module,
    name: str,
    *,
    timeout: float = 60.0,
    ranks: int | None = None,
    group: Any = None,
    averaged: bool = False,
    min_turn: int | None = None,
    **options: Any,
) -> Iterator[Session]:
    """Run a model's long prompts on all processes of this launch; each process stores a part of the keys and values.

    Every rank opens it with the same model and options, and calls `model(...)` or `model.generate(...)` with the same
    inputs. Every rank gets the same tokens. In one process it does what `hap.use` does. On exit the model is as before.

    Args:
        model: a causal decoder on this process's device, the same weights everywhere.
        name: "cqs_attention", "star_attention" or "tiled_attention".
        timeout: seconds that a rank waits in one exchange before it raises an error that names the missing rank.
        ranks: processes that share a prompt; None for all. Example: with 2, a launch of 4 has the groups 0 1 and 2 3,
            each with a prompt of its own (data parallel).
        group: instead of `ranks`, a process group of torch.distributed of which this process is a member: its ranks
            share a prompt. With tensor parallel weights these are the ranks with the same part of the weights. Example
            for 2 x 2: `init_device_mesh("cuda", (2, 2), mesh_dim_names=("context", "tensor"))["context"].get_group()`.
        averaged: in training, whether DDP, FSDP2 or Trainer averages the gradients over the whole launch. The loss's
            gradient is then multiplied by `ranks`, so that the average is the gradient of the mean loss of the groups.
        min_turn: tokens of a later turn, all batch rows together, from which on the turn is dealt over the ranks (see
            `parallel.turns`). A later turn is a forward of several tokens behind a filled cache: a second question, a
            chunk of a prompt. Shorter turns are computed by every rank. None: the number that
            `parallel.link.least_turn` counts for this model and launch; never where the config has no sizes.
        **options: the options of the plugin; in addition, for star_attention `anchor` ("auto", "recompute" or
            "broadcast"), for tiled_attention `exchange` ("auto", "gather" or "heads"), and for cqs_attention `rounds`
            (see `parallel.cqs.CQS`).

    In training mode `model(**batch, labels=labels).loss` is the loss over all tokens of the group's batch. Call
    `session.sum_gradients()` between `loss.backward()` and the optimizer's step, or pass `averaged=True`. Loss and
    gradients are those of one process, with the same attention weights dropped: rank 0's generator draws the seed.
    Dropout of hidden states is refused.

    Yields:
        The `Session`.

    Raises:
        ValueError: an unknown name or option, a `min_turn` below 2, or ranks that differ in model, options or library
            versions.
        NotImplementedError: a model whose context is not made of causal keys and values, DeepSpeed, or tensor parallel
            weights without a `group`.
        parallel.RankError: inside the block, if another rank fails or does not answer; it names the rank.
    """
    refuse_deepspeed(model)
    method, model = method_for(name, **options), language_model(model)
    check(model, name).raise_if_refused()
    refuse_placement(model, averaged, group, bool(getattr(method, "dense_heads", None)))
    if min_turn is not None and min_turn < 2:
        raise ValueError(f"min_turn={min_turn}: at least 2 tokens are needed, since every rank computes a single one.")
    joined = Group.join(timeout, ranks, group)
    error: BaseException | None = None
    try:
        if joined.size == 1:
            known = plugin(name).options_type().names()
            with use(model, name, **{key: value for key, value in options.items() if key in known}):
                yield Session(model, joined, method, name, averaged)
        else:
            settings = {"method": name, "options": options, "averaged": averaged, "min_turn": min_turn}
            with _session(model, joined, method, settings, averaged, min_turn) as session:
                yield session
    except BaseException as raised:
        error = raised
        raise
    finally:
        joined.leave(error)


@contextlib.contextmanager
def _session(
    model: nn.Module,
    group: Group,
    method: Method,
    settings: dict[str, Any],
    averaged: bool = False,
    min_turn: int | None = None,
) -> Iterator[Session]:
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "hf_attn_plugins": _version.__version__,
    }
    check_device(model, group)
    weights = "sharded" if is_sharded(model) else fingerprint(model, whole=True)  # shards differ from rank to rank
    part = tensor_part(model)
    place = None if part is None else part.place
    agree(group, {**settings, "model": weights, "part": place, **versions, "size": group.size}, what="set-up")
    if part is not None:
        same_random_state(group, part.group)
    same_random_state(group)  # an assistant model samples before the first forward here
    check_model(model)
    config = text_config(model).to_dict()
    method = method.settle(config, group)
    if min_turn is None:
        min_turn = least_turn_of(config, group)
    session = Session(model, group, method, settings.get("method", type(method).__name__), averaged, min_turn)
    row = Plugin(session.name, "one session of context_parallel", True, "", session.calls.attention, OfLayer)
    with installed(row, session.calls.mask):
        try:
            with use(model, session.name):
                session.forward.attach()
                yield session
        finally:
            session.forward.detach()
