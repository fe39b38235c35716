"""A hash of whatever decides a context's keys and values: caches of other models are refused by it, and only those."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.star.hf.model import decoder, text_config

ROWS = 64  # of an embedding that are looked at: the first ones, which stay when the vocabulary is enlarged
ELEMENTS = 64  # of every other tensor, evenly spread
# Fields of a config that change no key or value: how text ends, what is put out, how training starts, and what the
# weights or the options of the call say by themselves.
VOLATILE = {
    "_name_or_path", "transformers_version", "attn_implementation", "hf_attn_plugins", "use_cache", "architectures",
    "id2label", "label2id", "num_labels", "problem_type", "return_dict", "tie_word_embeddings", "vocab_size", "dtype",
    "torch_dtype", "quantization_config", "final_logit_softcapping", "logit_scale", "logits_scaling", "classifier_bias",
    "is_decoder", "chunk_size_feed_forward", "task_specific_params", "finetuning_task", "gradient_checkpointing",
}  # fmt: skip
BEGINNINGS = ("output_", "initializer", "router_aux", "router_z", "summary_")
ENDINGS = ("_token_id", "_token_index", "_dropout", "dropout", "_pdrop")


def fingerprint(model: nn.Module, whole: bool = False) -> str:
    """A hash of the decoder's config, where it differs from its class's defaults, and of a sample of its weights.

    The language-model head, tokens added to the vocabulary, labels, and fields that the config's class does not know
    (those of a later release, which this one cannot act on) change nothing in it.

    Args:
        whole: look at every weight of the model, its head included: for ranks that have to compute the same logits.
    """
    body = model if whole else decoder(model)
    facts = {"class": type(body).__name__, **_facts_of(text_config(model))}
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    embedding: Any = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None  # type: ignore[operator]
    table = getattr(embedding, "weight", None)
    for name, parameter in sorted(body.named_parameters()):
        if (
            parameter is table
            and not whole
            and not (hasattr(table, "__tensor_flatten__") or hasattr(table, "quant_state"))
        ):
            digest.update(f"{name} {tuple(parameter.shape[1:])} {parameter.dtype}".encode())
            digest.update(_elements(parameter.detach()[:ROWS], 4096))
        else:
            digest.update(_sample(name, parameter))
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """A hash of a tokenizer's vocabulary and special tokens."""
    contents = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.all_special_tokens)]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def _facts_of(config: Any) -> dict[str, Any]:
    kind: Any = type(config)
    declared, defaults = _declared(kind)
    return {
        name: value
        for name, value in config.to_dict().items()
        if name in declared and not _volatile(name) and (name not in defaults or value != defaults[name])
    }


def _volatile(name: str) -> bool:
    return name in VOLATILE or name.startswith(BEGINNINGS) or name.endswith(ENDINGS)


@functools.cache
def _declared(kind: Any) -> tuple[frozenset[str], dict[str, Any]]:
    """The fields that a config's class declares, and the values that a config made without arguments has."""
    names: set[str] = set()
    if dataclasses.is_dataclass(kind):
        names |= {field.name for field in dataclasses.fields(kind)}
    for each in kind.__mro__:
        if "__init__" in vars(each):
            names |= set(inspect.signature(each.__init__).parameters)  # type: ignore[misc]
    try:
        return frozenset(names), kind().to_dict()
    except Exception:  # a class that needs arguments: all of its fields count then
        return frozenset(names), {}


def _sample(name: str, tensor: Tensor) -> bytes:
    """Name, shape, dtype and some elements of a weight, through whatever quantisation has wrapped around it."""
    label = f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
    if tensor.is_meta:  # offloaded weights are not looked at
        return label
    state = getattr(tensor, "quant_state", None)
    if state is not None:
        # bitsandbytes, 4 bit: packs the weight anew at the first call on a CPU, only this stays as it was.
        return f"{name} {tuple(getattr(state, 'shape', ()))} {getattr(state, 'quant_type', None)}".encode()
    if hasattr(tensor, "to_local"):  # a DTensor, of which this process holds a part
        tensor = tensor.to_local()
    if hasattr(tensor, "__tensor_flatten__"):  # torchao: a tensor made of tensors
        inner, _ = tensor.__tensor_flatten__()
        return label + b"".join(_sample(part, getattr(tensor, part)) for part in inner)
    return label + _elements(tensor)


def _elements(tensor: Tensor, count: int = ELEMENTS) -> bytes:
    if tensor.is_meta or not tensor.numel():
        return b""
    flat = tensor.detach().as_subclass(Tensor).reshape(-1)  # type: ignore[arg-type]
    return flat[:: max(1, len(flat) // count)][:count].cpu().contiguous().view(torch.uint8).numpy().tobytes()
