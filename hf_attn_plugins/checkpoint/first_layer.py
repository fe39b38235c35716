"""First-layer tables: audit whether the first projections depend on the token id alone, and compute them by token."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.checkpoint import fingerprint
from hf_attn_plugins.checkpoint.attach import ATTRIBUTE
from hf_attn_plugins.checkpoint.places import Places

PROBE = 12  # tokens of the audit's trial run


@dataclass(frozen=True)
class Audit:
    """Whether tables are exact for a model, and why.

    Attributes:
        places: where they would act; None when refused.
        reasons: a line per check.
        refusal: why tables would be wrong, None when they are exact.
    """

    places: Places | None
    reasons: tuple[str, ...]
    refusal: str | None = None

    def require(self) -> Places:
        """The places, or ValueError with the reason there are none."""
        if self.places is None:
            raise ValueError(f"first-layer tables would not be exact: {self.refusal}.")
        return self.places


@dataclass(frozen=True)
class Gain:
    """What tables cost and save, beside the model's totals."""

    bytes_added: int
    bytes_of_model: int
    bytes_replaced: int
    flops_saved: int
    flops_of_model: int

    def lines(self) -> list[str]:
        """For the user: numbers first, then whether it pays."""
        saved, added = self.flops_saved / self.flops_of_model, self.bytes_added / self.bytes_of_model
        if self.bytes_added <= self.bytes_replaced:
            verdict = "it pays: the tables are smaller than the matrices they replace."
        else:
            verdict = (
                f"it hardly pays: {added:.1%} more memory for {saved:.2%} less arithmetic; tables pay where the "
                "vocabulary is no larger than the hidden size (bytes, characters), or where layers are few."
            )
        return [
            f"adds {self.bytes_added / 1e6:.1f} MB to {self.bytes_of_model / 1e6:.1f} MB of weights ({added:.1%}); "
            f"saves {self.flops_saved / 1e6:.2f} of {self.flops_of_model / 1e6:.1f} MFLOP a token ({saved:.2%}).",
            verdict,
        ]


def audit(model: Any) -> Audit:
    """Find the first layer's projections and try whether their input is a function of the token id alone.

    The structure is read off a trial run of 12 tokens, not off a list of families. The run tells which modules see the
    first norm's output, whether a second embedding is added, and whether each row equals that of its token alone at
    position 0.
    """
    reasons: list[str] = []

    def refuse(why: str) -> Audit:
        return Audit(None, tuple(reasons), why)

    if getattr(model, ATTRIBUTE, None) is not None:
        return refuse("tables are attached already")
    if getattr(model, "hf_quantizer", None) is not None or getattr(model.config, "quantization_config", None):
        return refuse("the model is quantized: its projections are not plain matrices")
    adapters = [name for name, _ in model.named_modules() if "lora" in name.lower()]
    if adapters or getattr(model, "peft_config", None):
        return refuse(f"adapters (LoRA) sit on the projections ({(adapters or ['peft_config'])[0]}): merge them first")
    reasons.append("no adapters, not quantized")
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    embedding = model.get_input_embeddings()
    depth = getattr(text, "num_hidden_layers", 0)
    stack = next((n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth), None)
    if not isinstance(embedding, nn.Embedding) or stack is None or not depth:
        return refuse("no token embedding or no stack of layers was found")
    names = {module: name for name, module in model.named_modules()}
    decoder, first = model.get_submodule(stack.rpartition(".")[0]), model.get_submodule(stack)[0]
    ids = torch.randint(0, embedding.num_embeddings, (1, PROBE), generator=torch.Generator().manual_seed(0))
    ids = ids.to(embedding.weight.device)
    with _recorded(model) as seen:
        model(input_ids=ids, use_cache=False)
    inner = set(first.modules())
    hidden = next((x for module, x, _ in seen if module is first), None)
    if hidden is None or all(module is not embedding for module, _, _ in seen):
        return refuse("the first layer is not called with the embedded tokens")
    before = [module for module, _, _ in seen[: [m for m, _, _ in seen].index(first)]]
    others = [names[m] for m in before if isinstance(m, nn.Embedding) and m is not embedding]
    if others:
        return refuse(f"{', '.join(others)} is added to the token embedding (positions or token types)")
    reasons.append("no embedding beside the token's is added: positions are rotary or absent")
    norm = next((m for m, x, _ in seen if m in inner and m is not first and _is_norm(m) and _same(x, hidden)), None)
    source = hidden if norm is None else next(y for m, _, y in seen if m is norm)
    readers = [m for m, x, _ in seen if m in inner and not list(m.children()) and m is not norm and _same(x, source)]
    projections = [m for m in readers if type(m) is nn.Linear and "att" in names[m][len(stack) :].lower()]
    if not projections:
        return refuse(
            f"no plain nn.Linear of the first layer's attention reads {names.get(norm) or 'its input'} directly"
        )
    reasons.append(
        f"layer 0 projects {', '.join(names[m].rpartition('.')[2] for m in projections)} from "
        + ("its bare input" if norm is None else f"{names[norm]} ({type(norm).__name__})")
    )
    places = Places(
        names[decoder],
        names[embedding],
        None if norm is None else names[norm],
        tuple(names[m] for m in projections),
    )
    rows = fingerprint.inputs(model, places.projections[0], ids)[0]
    if not bool(rows.isfinite().all()):
        return refuse("the projections' input is not finite for some tokens (NaN or infinity in the weights)")
    singles = torch.cat([fingerprint.inputs(model, places.projections[0], ids[:, t : t + 1])[0] for t in range(PROBE)])
    if not torch.allclose(rows.float(), singles.float(), rtol=1e-2, atol=1e-4 * float(rows.float().abs().max())):
        return refuse("the projections' input differs with position or context")
    reasons.append("each row equals that of its token alone at position 0")
    looked_up = embedding.weight[ids].detach()  # before any scale that the embedding module applies itself
    ratio = (hidden.float() / looked_up.float())[looked_up != 0]
    scaled = bool(ratio.numel()) and not torch.allclose(ratio, torch.ones_like(ratio), rtol=1e-3)
    reasons.append(f"embedding scaled by {ratio.median():.4g}, included" if scaled else "the embedding enters unscaled")
    biased = [names[m].rpartition(".")[2] for m in projections if m.bias is not None]
    reasons.append(f"biases of {', '.join(biased)} are included" if biased else "no biases")
    attention = names[projections[0]].rpartition(".")[0] + "."
    later = [names[m].removeprefix(attention) for m in inner if names[m].startswith(attention) and _is_norm(m)]
    if later:
        reasons.append(f"{', '.join(sorted(later))} after the projections: left as it is")
    tied = bool(getattr(text, "tie_word_embeddings", False))
    reasons.append(f"the embedding stays for the residual{' and the tied output' if tied else ''}")
    reasons.append(f"layers 1 to {depth - 1}: refused, their input depends on the context")
    return Audit(places, tuple(reasons))


@torch.no_grad()
def build(model: nn.Module, places: Places, batch: int = 1024) -> dict[str, Tensor]:
    """One row per token id and projection, computed by the model's own modules in its own dtype.

    Returns:
        by projection path: (vocabulary, out_features), on the CPU.
    """
    embedding: Any = model.get_submodule(places.embedding)
    rows: dict[str, list[Tensor]] = {path: [] for path in places.projections}
    for start in range(0, embedding.num_embeddings, batch):
        ids = torch.arange(start, min(start + batch, embedding.num_embeddings), device=embedding.weight.device)
        hidden = fingerprint.inputs(model, places.projections[0], ids.unsqueeze(1))[:, 0]
        for path in places.projections:
            rows[path].append(model.get_submodule(path)(hidden).cpu())
    return {path: torch.cat(each) for path, each in rows.items()}


def gain(model: nn.Module, places: Places) -> Gain:
    """Bytes and FLOPs (multiply and add count as two) of tables for this model, context-dependent attention aside."""
    embedding: Any = model.get_submodule(places.embedding)
    projections: list[Any] = [model.get_submodule(path) for path in places.projections]
    columns, item = sum(p.out_features for p in projections), embedding.weight.element_size()
    matrices = sum(p.numel() for m in model.modules() if isinstance(m, nn.Linear) for p in m.parameters(recurse=False))
    return Gain(
        bytes_added=embedding.num_embeddings * columns * item,
        bytes_of_model=sum(p.nbytes for p in model.parameters()),
        bytes_replaced=sum(p.weight.numel() * item for p in projections),
        flops_saved=2 * sum(p.weight.numel() for p in projections),
        flops_of_model=2 * matrices,
    )


@contextmanager
def _recorded(model: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor, Tensor]]]:
    """(module, first tensor in, first tensor out) of every call, in the order the calls begin."""
    seen: list[Any] = []
    hooks = []

    def tensor(*values: Any) -> Tensor | None:
        return next((v for v in values if isinstance(v, Tensor)), None)

    def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
        seen.append([module, tensor(*args, *kwargs.values()), None])

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        entry = next(entry for entry in reversed(seen) if entry[0] is module and entry[2] is None)
        entry[2] = tensor(*(output if isinstance(output, tuple) else (output,)))

    try:
        for module in model.modules():
            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave, with_kwargs=True))
        with torch.no_grad():
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and (a is b or (a.shape == b.shape and torch.equal(a, b)))
