"""Training inside `context_parallel`: the loss of this rank's tokens, and the sum of gradients over all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.hf.compat import has_causal_lm_loss
from hf_attn_plugins.parallel.comm.group import Group

IGNORED = -100  # the label that Transformers' losses leave out
BUCKET = 2**25  # elements summed in one exchange


class ShardedLoss:
    """The causal language-model loss of one forward; each rank computes the terms of its own tokens.

    The label of a token is the next token, which another rank may own. Every rank has all labels, so they are shifted
    first and divided afterwards.

    Args:
        model: its `loss_function` is used.
        labels: (B, L) long of the whole prompt, `IGNORED` for tokens without a loss.
        num_items: the divisor of the sum, as Trainer passes it; None for the number of labels that are not ignored.

    Raises:
        NotImplementedError: a model with another loss than `ForCausalLMLoss`, or with a router's auxiliary loss.
    """

    def __init__(self, model: nn.Module, labels: Tensor, num_items: Tensor | int | None) -> None:
        self._function: Any = getattr(model, "loss_function", None)
        if not has_causal_lm_loss(model):
            raise NotImplementedError(
                f"{type(model).__name__} has a loss of its own, which context_parallel cannot cut into shards: call it "
                "without labels, and sum a loss over the logits of `columns`."
            )
        if getattr(model.config, "output_router_logits", False):  # type: ignore[union-attr]
            raise NotImplementedError(
                "the router's auxiliary loss needs the tokens of all ranks: set config.output_router_logits=False."
            )
        self.next = nn.functional.pad(labels, (0, 1), value=IGNORED)[:, 1:]
        self.num_items = (self.next != IGNORED).sum() if num_items is None else num_items
        self.vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr, operator]

    def __call__(self, logits: Tensor, columns: Tensor, group: Group, scale: float = 1.0) -> Tensor:
        """The loss over all tokens, the same on every rank. Its gradient is the gradient of this rank's terms.

        Args:
            logits: (B, T, V) of this rank's tokens.
            columns: (B, T) long, the column of each; -1 for none. Each column is on one rank.
            group: the ranks.
            scale: factor of the gradient.
        """
        labels = self.next.to(columns.device).gather(1, columns.clamp_min(0))
        mine = torch.where(columns < 0, IGNORED, labels).to(logits.device)
        terms = self._function(
            logits=logits, labels=None, vocab_size=self.vocabulary, num_items_in_batch=self.num_items, shift_labels=mine
        )
        whole = group.sum(terms.detach(), what="loss")
        terms = terms * scale
        return terms - terms.detach() + whole  # the value is `whole`, the same on every rank

    def check_padding(self, real: Tensor) -> None:
        """Refuse labels that only padding predicts, for a method that does not compute padding.

        Args:
            real: (B, L) bool, False for padding.

        Raises:
            ValueError: such a label.
        """
        where = ((self.next != IGNORED) & ~real.to(self.next.device)).nonzero()
        if len(where):
            row, column = where[0].tolist()
            raise ValueError(
                f"the label at column {column + 1} of row {row} is predicted by padding, which star_attention does not "
                f"compute on several ranks: pad on the right, or set this label to {IGNORED}."
            )


ATTENTION = ("attention_dropout", "attn_dropout", "attn_pdrop")  # in a config or a module: drops attention weights


def refuse_dropout(model: nn.Module) -> None:
    """Raise NotImplementedError for hidden states that are dropped: each rank would draw a mask of its own.

    Dropout of attention weights is not refused: which weights are dropped follows from their places (`core.drops`).
    """
    config: Any = model.config
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    found = [f"config.{name}={value}" for name, value in config.to_dict().items() if _drops(name, value)]
    for name, module in model.named_modules():
        drops = isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 and module.training
        if drops and name.rpartition(".")[2] not in ATTENTION:
            found.append(f"{name}.p={module.p}")
    if found:
        raise NotImplementedError(
            f"dropout ({found[0]}) of hidden states draws other masks on several ranks than in one process: set it to "
            "0 to train inside context_parallel. Dropout of attention weights may stay."
        )


def _drops(name: str, value: Any) -> bool:
    is_rate = name.endswith(("dropout", "pdrop")) and isinstance(value, float | int) and value > 0
    return is_rate and name not in ATTENTION and "classifier" not in name and "summary" not in name


def same_batches(loader: Any, group: Group) -> Any:
    """A data loader that Accelerate or Trainer prepared, changed so that all ranks of a group get the same batches.

    Prepared loaders give every process of the launch batches of its own. With groups of all ranks, every rank then gets
    every batch; else group g of n gets the batches that process g of n would get.

    Raises:
        ValueError: a loader that Accelerate has not prepared for several processes, or one whose batches are dealt by
            the main process (`dispatch_batches`, iterable data sets).
    """
    shard: Any = getattr(loader, "batch_sampler", None)
    if group.size * group.count == 1:
        return loader
    if not hasattr(shard, "num_processes") or not hasattr(shard, "process_index"):
        raise ValueError(
            f"same_batches() got a {type(loader).__name__} without a batch sampler that Accelerate has divided: "
            "prepare a loader over a map-style data set, without dispatch_batches."
        )
    shard.num_processes, shard.process_index = group.count, group.index
    return loader


def sum_gradients(model: nn.Module, group: Group) -> None:
    """Replace each parameter's gradient by its sum over all ranks; a parameter that has none on any rank keeps none."""
    if group.size == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=group.device)
    anywhere = group.sum(has, what="gradients").tolist()
    with torch.no_grad():
        for bucket in _buckets([p for p, count in zip(parameters, anywhere, strict=True) if count]):
            wide = torch.float64 if bucket[0].dtype == torch.float64 else torch.float32
            for p in bucket:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            grads = [_local(p.grad) for p in bucket]
            summed = group.sum(torch.cat([g.flatten().to(wide) for g in grads]), what="gradients")
            for grad, part in zip(grads, summed.split([g.numel() for g in grads]), strict=True):
                grad.copy_(part.view_as(grad))


def _local(tensor: Any) -> Tensor:
    """The part of a tensor that this process stores, where it is divided (DTensor)."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def _buckets(parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for p in parameters:
        full = sum(each.numel() for each in bucket) + p.numel() > BUCKET
        if bucket and (full or (p.dtype, p.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket
