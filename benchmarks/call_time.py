"""Python's time in one attention call of a Transformers model, in microseconds: the kernel replaced by nothing.

python benchmarks/call_time.py --out benchmarks/results

Alone on the machine, one thread. A call is made again and again with the arguments that a model gave; the fastest
twentieth of thousands counts, since everything else of the machine can only add to it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_attn_plugins  # noqa: F401  (registers the plugins)
from hf_attn_plugins.bench.timing import write_table
from hf_attn_plugins.hf.calls import interface
from hf_attn_plugins.hf.compat import cache_keyword
from hf_attn_plugins.kernels import choose
from hf_attn_plugins.kernels.aten import attend as aten
from hf_attn_plugins.kernels.cpu_fused import attend as fused
from hf_attn_plugins.kernels.cpu_fused import call as compiled
from hf_attn_plugins.tiled import entry

CASES = ((torch.float32, 1, 128), (torch.bfloat16, 1, 128), (torch.bfloat16, 1, 4096), (torch.float32, 512, 512),
         (torch.bfloat16, 512, 512))  # fmt: skip
CALLS, ROUNDS = 2000, 5


class Nothing:
    """A library whose kernels return at once."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def main() -> None:
    """Time every case and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for call_time.md and call_time.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = [row(*case) for case in CASES]
    notes = (
        "SmolLM2-135M's attention: 9 query heads, 3 key heads, head_dim 64, causal. `whole`: everything between the "
        "model and the kernel and back, memory for the results included. `from the mask on` begins at "
        "`tiled.entry.attention`, where Transformers' arguments are one mask. `kernel's own`: Python of the chosen "
        "kernel. `sdpa`: Transformers' function for it, which copies shared keys for each query head."
    )
    print("written to", write_table(given.out, "call_time", "Python's time in an attention call", rows, notes))


def row(dtype: torch.dtype, queries: int, keys: int) -> dict[str, Any]:
    """One case: microseconds of the whole call and of its parts."""
    whole, sdpa = (captured(name, dtype, queries, keys) for name in ("tiled_attention", "sdpa"))
    out = torch.empty(1, 9, queries, 64, dtype=dtype)
    with without_kernels(out):
        inner = spied(entry, "attend", whole)
        own = spied(fused, "forward", whole)
        kernel = "cpu_fused" if own else "aten"
        own = own or spied(choose, "SHORT", whole) or spied(choose, "ATEN", whole)
        found = {
            "dtype": str(dtype).removeprefix("torch."), "queries": queries, "keys": keys,
            "kernel": kernel, "whole, us": fastest(whole),
            "from the mask on, us": fastest(inner), "kernel's own, us": fastest(own), "sdpa, us": fastest(sdpa),
        }  # fmt: skip
    print(found, flush=True)
    return found


def captured(name: str, dtype: torch.dtype, queries: int, keys: int) -> Callable[[], Any]:
    """The call that a model of one layer makes for `queries` tokens behind `keys - queries` in its cache."""
    config = LlamaConfig(hidden_size=576, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=1,
                         intermediate_size=64, vocab_size=64, max_position_embeddings=8192)  # fmt: skip
    config._attn_implementation = name
    model, real, seen = LlamaForCausalLM(config).eval().to(dtype), ALL_ATTENTION_FUNCTIONS[name], []

    def spy(*arguments: Any, **keywords: Any) -> Any:
        seen.append((arguments, keywords))
        return real(*arguments, **keywords)

    with mock.patch.dict(ALL_ATTENTION_FUNCTIONS._global_mapping, {name: spy}):
        cache = DynamicCache(config=model.config)
        for length in (keys - queries, queries):
            if length:
                model(torch.zeros(1, length, dtype=torch.long), **{cache_keyword(model): cache})
    arguments, keywords = seen[-1]
    return lambda: real(*arguments, **keywords)


def spied(module: Any, name: str, call: Callable[[], Any]) -> Callable[[], Any] | None:
    """The call of one function, or of a `Choice`'s, that `call` makes, to be made again; None where it makes none."""
    found = getattr(module, name)
    real = found.run if isinstance(found, choose.Choice) else found
    spy = mock.Mock(wraps=real)
    with mock.patch.object(module, name, spy if real is found else choose.Choice(found.name, spy)):
        call()
    if not spy.called:
        return None
    arguments = spy.call_args
    return lambda: real(*arguments.args, **arguments.kwargs)


@contextmanager
def without_kernels(out: torch.Tensor) -> Iterator[None]:
    """PyTorch's operators return `out`, and compiled kernels do nothing."""
    real = compiled._checked
    lse = torch.empty(out.shape[:3])
    folded = torch.empty(1, 3, 3, 64, dtype=out.dtype), torch.empty(1, 3, 3)

    def operator(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return folded if query.shape[1] == 3 else (out, lse)

    with (
        mock.patch.object(compiled, "_checked", lambda *asked: (real(*asked)[0], Nothing())),
        mock.patch.object(aten, "flash_cpu", operator),
        mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", lambda *_, **__: out),
        mock.patch.object(interface.recorder, "OPEN", {}),
    ):
        yield


def fastest(call: Callable[[], Any] | None) -> float:
    """Microseconds of a call: the smallest twentieth of `CALLS`, the best of `ROUNDS`."""
    if call is None:
        return float("nan")
    found = []
    for _ in range(ROUNDS):
        times = []
        for _ in range(CALLS):
            began = time.perf_counter_ns()
            call()
            times.append(time.perf_counter_ns() - began)
        found.append(sorted(times)[CALLS // 20])
    return min(found) / 1000


if __name__ == "__main__":
    main()
