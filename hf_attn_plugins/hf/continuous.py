"""`continuous_batching`: Transformers' `generate_batch` over our kernels, by sequence lengths instead of a mask.

Transformers takes "sdpa", "paged|eager" and names with "flash" there. Under the first two it allocates a mask of
(tokens of a batch) x (tokens of the cache), once per layer type. Under a name with "flash" there is no mask: the call
says where each sequence begins, and memory follows the tokens. `NAME` is such a name. It is registered, and stands in a
model's config, only inside `with continuous_batching(model)`.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from hf_attn_plugins.core.decision import CallFacts, Decision
from hf_attn_plugins.core.mask import Mask, window_of
from hf_attn_plugins.core.partial import with_sinks
from hf_attn_plugins.hf.calls import call_arguments, interface, recorder
from hf_attn_plugins.hf.compat import forget_attention, implementation_of, set_implementation
from hf_attn_plugins.hf.known_good import refuse_unless_good
from hf_attn_plugins.hf.masks.mask_function import mask_function
from hf_attn_plugins.hf.models.configs import configs_of
from hf_attn_plugins.hf.models.unwrap import language_model
from hf_attn_plugins.kernels.varlen import attend_varlen
from hf_attn_plugins.plugins import EXACT, plugin

NAME = "hf_attn_paged_flash"
_ENTERED, _LOCK = [0], threading.Lock()
_PAGED = {"cache", "read_index", "write_index", "logits_indices", "logits_processor_args", "block_table"}


@contextlib.contextmanager
def continuous_batching(model: nn.Module, name: str = EXACT) -> Iterator[nn.Module]:
    """Run `generate_batch`, or a manager of continuous batching, with our kernels; all is put back at the end.

    No mask is built: each sequence's rows see its own keys in the paged cache. Prefix sharing, streaming, chunked
    prompts, sliding windows and sinks work as under "sdpa". Ordinary calls of the model inside the block work, too.

        with hap.continuous_batching(model):
            answers = model.generate_batch(inputs=prompts, max_new_tokens=64)

    Args:
        model: a causal language model of Transformers that has continuous batching, whatever its implementation is.
        name: "tiled_attention". The other plugins plan over one sequence at a time.

    Raises:
        ValueError: another plugin, a model without `generate_batch`, or one that does not take plugins.
    """
    row, inner = plugin(name), language_model(model)
    if row.name != EXACT:
        raise ValueError(f"{name} has no plan for many sequences in one call: use {EXACT!r} in continuous batching.")
    if not hasattr(inner, "generate_batch"):
        raise ValueError(
            f"{type(inner).__name__} has no generate_batch: continuous batching is for causal language models of "
            "Transformers."
        )
    refuse_unless_good(inner, name)
    before = [(config, implementation_of(config)) for config in configs_of(inner)]
    _enter()
    try:
        for config, _ in before:
            set_implementation(config, NAME)
        yield model
    finally:
        for config, implementation in before:
            set_implementation(config, implementation)
        _leave()


def _enter() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    with _LOCK:
        _ENTERED[0] += 1
        if _ENTERED[0] == 1:
            AttentionInterface.register(NAME, paged_attention)
            AttentionMaskInterface.register(NAME, mask_function)


def _leave() -> None:
    with _LOCK:
        _ENTERED[0] -= 1
        if _ENTERED[0] == 0:
            forget_attention(NAME)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One attention call of continuous batching: rows of many sequences, and all keys that the cache has of them.

    Args:
        query: (1, Hq, T, D); key, value: (1, Hkv, S, D or Dv), read from the paged cache already.
        cu_seq_lens_q, cu_seq_lens_k: (n + 1,) where each sequence begins, of this layer's type.
        sliding_window, softcap, s_aux, sinks: as in `hf.calls.interface.forward`, which takes calls without a cache.

    Returns:
        ((1, T, Hq, Dv) contiguous, None).

    Raises:
        NotImplementedError: a keyword that would change the result, a block table, which our kernels do not read, or a
            cache that was not read yet (Transformers before 5.24).
    """
    shared = {"softcap": softcap, "s_aux": s_aux, "sinks": sinks, "sliding_window": sliding_window}
    exact = interface.Method.of(plugin(EXACT))
    if kwargs.get("read_index") is None:
        given = {"dropout": dropout, "scaling": scaling, "cu_seq_lens_q": cu_seq_lens_q, **shared, **kwargs}
        return interface.forward(exact, exact, module, query, key, value, attention_mask, **given)
    if kwargs.get("block_table") is not None:
        raise NotImplementedError(f"{EXACT} does not read block tables: pass max_blocks_per_request=0.")
    if not isinstance(cu_seq_lens_q, Tensor) or not isinstance(cu_seq_lens_k, Tensor):
        raise NotImplementedError(
            "the paged cache was not read before the attention call: continuous_batching needs Transformers 5.24, or "
            "`with hap.intercept(model)` on a model with sdpa."
        )
    call_arguments.refuse_unknown(EXACT, module, {k: v for k, v in kwargs.items() if k not in _PAGED})
    query, key, value = call_arguments.one_dtype(query, key, value)
    trace = recorder.on(module)
    if trace is not None:
        made = Decision("tiled", plan={"sequences": len(cu_seq_lens_q) - 1}, plugin=EXACT)
        facts = CallFacts(query.shape[2], key.shape[2], 1, None, Mask(causal=True, window=window_of(sliding_window)))
        recorder.add(trace, made, facts, getattr(module, "layer_idx", None), ("causal", "paged"), True)
    kernel = getattr(exact.options(getattr(module, "config", None)), "kernel", None)
    found = attend_varlen(
        query, key, value, cu_seq_lens_q, cu_seq_lens_k, is_causal=True, window=sliding_window,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling, softcap=softcap, dropout=dropout, kernel=kernel,
    )  # fmt: skip
    sink = call_arguments.sink_of(s_aux, sinks, query, EXACT)
    return with_sinks(found, sink).out.transpose(1, 2).contiguous(), None
