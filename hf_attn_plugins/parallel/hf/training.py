"""Training inside `context_parallel`: labels and loss of this rank's tokens, gradients of all ranks together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.hf.compat import has_causal_lm_loss
from hf_attn_plugins.parallel.comm.group import Group

IGNORED = -100  # the label that Transformers' losses leave out
BUCKET = 2**25  # numbers summed in one exchange


class ShardedLoss:
    """The causal language-model loss of one forward, each rank computing the terms of its own tokens.

    A token's label is the next token, which the next rank may own; since every rank is given all labels, they are
    shifted before they are cut.

    Args:
        model: whose `loss_function` it is.
        labels: (B, L) long of the whole prompt, `IGNORED` for those that do not count.
        num_items: what the sum is divided by, as Trainer gives it; None for the number of labels that count.
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

    def __call__(self, logits: Tensor, columns: range, group: Group) -> Tensor:
        """The whole loss, the same on every rank; its gradient is that of this rank's terms.

        Args:
            logits: (B, T, V) of the tokens at `columns`.
        """
        mine = self.next[:, columns.start : columns.stop].to(logits.device).contiguous()
        terms = self._function(
            logits=logits, labels=None, vocab_size=self.vocabulary, num_items_in_batch=self.num_items, shift_labels=mine
        )
        whole = group.sum(terms.detach(), what="loss")
        return terms - terms.detach() + whole  # the same bits on every rank


def sum_gradients(model: nn.Module, group: Group) -> None:
    """Replace every parameter's gradient by the sum over all ranks; parameters without one anywhere keep none."""
    if group.size == 1:
        return
    parameters = [p for p in model.parameters() if p.requires_grad]
    has = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=group.device)
    anywhere = group.sum(has, what="gradients").tolist()
    with torch.no_grad():
        for bucket in _buckets([p for p, count in zip(parameters, anywhere, strict=True) if count]):
            wide = torch.float64 if bucket[0].dtype == torch.float64 else torch.float32
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            summed = group.sum(torch.cat([g.flatten().to(wide) for g in grads]), what="gradients")
            for p, part in zip(bucket, summed.split([p.numel() for p in bucket]), strict=True):
                p.grad = part.view_as(p).to(p.dtype)


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
