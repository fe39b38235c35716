"""FlexAttention compiled without a GPU: by inductor's C++ for CPUs, which gives no lse; and the Triton code that
inductor writes for a GPU, run in Triton's interpreter and compiled ahead of time.

python -m tests.kernels.test_flex_generated run CASE ...          with TRITON_INTERPRET=1
python -m tests.kernels.test_flex_generated compile sm90 CASE ...
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.kernels.attend import attend
from hf_attn_plugins.kernels.flex import attend as flex
from hf_attn_plugins.kernels.triton.support import INSTALLED
from hf_attn_plugins.star.entry import attention as star_attention
from hf_attn_plugins.star.options import StarOptions
from tests.kernels.test_flex import MASKS
from tests.kernels.triton_cases import check, draw
from tests.star.test_entry import pattern

pytestmark = pytest.mark.slow
needs_inductor = [
    pytest.mark.skipif(not INSTALLED, reason="Triton is not installed"),
    pytest.mark.skipif(not torch.__version__.startswith("2.13."), reason="stops the inductor of PyTorch 2.13"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here: -m gpu compiles FlexAttention itself"),
]


class Case(NamedTuple):
    """A call of FlexAttention: the pairs that it sees, (B, 1 or Hq, rows, keys), and what computes it."""

    seen: torch.Tensor
    run: Callable[..., Partial]
    softcap: float | None = None
    bias: torch.Tensor | None = None

    def check(self, gradients: bool, dtype: torch.dtype = torch.float32) -> None:
        """Assert the error rule against float64."""
        fields = dict(bias=self.seen if self.bias is None else self.bias.masked_fill(~self.seen, -torch.inf))
        options = {} if self.softcap is None else dict(softcap=self.softcap)
        inputs = draw(len(self.seen), *self.seen.shape[2:], heads=(4, 2), dims=(20, 12), dtype=dtype)
        check(inputs, fields, run=self.run, gradients=gradients, **options)


def masked(name: str, rows: int, keys: int, softcap: float | None = None) -> Case:
    """A mask of test_flex.py."""
    mask = Mask(**MASKS[name](rows, keys))
    seen = mask.visible(torch.arange(rows), torch.arange(keys), mask.start(rows, keys), 2)
    return Case(
        seen.expand(2, -1, rows, keys),
        lambda q, k, v: attend(q, k, v, mask=mask, softcap=softcap, kernel="flex"),
        softcap,
    )


def biased() -> Case:
    """A float mask with a softcap."""
    bias = torch.randn(1, 4, 140, 150, generator=torch.Generator().manual_seed(0))
    run = lambda q, k, v: attend(q, k, v, mask=bias, softcap=4.0, kernel="flex")  # noqa: E731
    return Case(torch.ones(2, 1, 140, 150, dtype=torch.bool), run, 4.0, bias)


def star(heads: tuple[int, ...], softcap: float | None, padded: bool = False) -> Case:
    """Star's plan with a halo, in one call; a row of the batch per key head where heads differ."""
    options = StarOptions(
        block_size=40, anchor_size=25, query_size=30, halo_size=9, dense_heads=[heads], kernel="flex"
    )  # fmt: skip
    spans, mask = [[(0, 150)]], Mask(causal=True)
    if padded:
        spans = [[(11, 150)], [(0, 130)]]
        real = torch.arange(150)
        mask = mask.replace(key_padding=torch.stack([real >= 11, real < 130]))
    seen = torch.cat([pattern(prompts, 150, 150, options) for prompts in spans])

    def run(query, key, value):
        scale = query.shape[-1] ** -0.5
        return star_attention(query, key, value, mask, scale=scale, softcap=softcap, dropout=0.0, options=options)

    return Case(seen, run, softcap)


CASES: dict[str, Callable[[], Case]] = {
    "causal, softcap": lambda: masked("causal", 140, 150, 4.0),
    "star": lambda: star((), None),
    "star, a dense head, softcap": lambda: star((1,), 4.0),
    "star, padding": lambda: star((), None, padded=True),
    "two-sided window": lambda: masked("two-sided window", 140, 150),
    "prefix and window": lambda: masked("prefix and window", 140, 150),
    "segments and padding": lambda: masked("segments and padding", 140, 150),
    "a row without keys": lambda: masked("a row without keys", 140, 150),
    "an offset in a tensor": lambda: masked("an offset in a tensor", 140, 150),
    "predicate": lambda: masked("predicate", 140, 150),
    "bool mask": lambda: masked("bool mask", 140, 150),
    "float bias, softcap": biased,
    "few rows": lambda: masked("window", 3, 150, 4.0),
}
WITH_GRADIENTS = ("causal, softcap", "star, a dense head, softcap", "star, padding")
ON_CPU = ("causal, softcap", "star, a dense head, softcap", "segments and padding", "predicate", "float bias, softcap")
COMPILED = ("causal, softcap", "star", "segments and padding", "few rows")


def main(what: str, *words: str) -> None:
    """Run cases in the interpreter, or compile them for an architecture; print one line each."""
    from tests.kernels import generated

    if what == "compile":
        arch, *names = words
        for name in names:
            with generated.flex_for(arch, lambda code: generated.compile_ahead(arch, code)):
                try:
                    CASES[name]().check(True, torch.bfloat16)
                except Exception as error:
                    if "Stop" not in str(error):
                        raise
            print(f"compiled: {name}", flush=True)
        return
    for name in words:
        with generated.flex_for("sm90", generated.run_in_interpreter):
            CASES[name]().check(what == "gradients")
        print(f"right: {name}", flush=True)


def marked(marks):
    """A decorator for several marks."""
    return lambda test: functools.reduce(lambda marked, mark: mark(marked), marks, test)


def process(*words: str, **environment: str) -> str:
    others = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.test_flex_generated", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=others | environment)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles with g++")
@pytest.mark.parametrize("name", ON_CPU)
def test_compiled_for_the_cpu(name, monkeypatch, tmp_path):
    """`out` is compiled; PyTorch gives no lse then, so that of the uncompiled form stands beside it."""
    from torch.nn.attention import flex_attention as public

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # a process that was killed leaves broken files
    torch.compiler.reset()
    plain, compiled, calls = flex.flex_attention(False), torch.compile(public.flex_attention, fullgraph=True), []

    def run(*given):
        calls.append(compiled(*given))
        return calls[-1], plain(*given)[1]

    monkeypatch.setattr(flex, "flex_attention", lambda compile: run)
    CASES[name]().check(False)
    assert len(calls) == 1


@marked(needs_inductor)
def test_forward_in_the_interpreter():
    assert process("run", *CASES, TRITON_INTERPRET="1").count("right: ") == len(CASES)


@marked(needs_inductor)
@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_in_the_interpreter(name):
    """Through out and lse, by the code of the backward."""
    assert process("gradients", name, TRITON_INTERPRET="1").count("right: ") == 1


@marked(needs_inductor)
@pytest.mark.parametrize("arch", ["sm80", "sm90"])
def test_it_compiles_ahead_of_time(arch):
    found = process("compile", arch, *COMPILED)
    assert found.count("compiled: ") == len(COMPILED)
    lines = [line for line in found.splitlines() if "_tem_" in line]
    assert len(lines) == 2 * len(COMPILED)  # forward and backward
    assert all("MMA" in line for line in lines) and ("HGMMA" in found) == (arch == "sm90")


if __name__ == "__main__":
    main(*sys.argv[1:])
