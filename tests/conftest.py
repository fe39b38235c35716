"""What every test shares: Triton's interpreter without a GPU, no network, and the same random numbers in every run."""

from __future__ import annotations

import gc
import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is first imported, which Transformers may do: so it is set before any test file is collected.
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Read when these libraries are first imported: otherwise a missing file is looked for on the hub, again and again.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"


@pytest.fixture(autouse=True, scope="module")
def imports_are_no_garbage():
    """Garbage collection skips all that was imported so far: every measurement of peak memory begins with one."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # so that the interpreter takes everything down as it does without us


@pytest.fixture(autouse=True, scope="session")
def products_of_the_interpreter_round_once():
    """Triton's interpreter multiplies with NumPy, whose rounding differs from CPU to CPU: here it sums in float64."""
    if os.environ.get("TRITON_INTERPRET") != "1" or importlib.util.find_spec("triton") is None:
        return
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(_, a, b, total, *__):
        product = numpy.matmul(a.data, b.data, dtype=numpy.float64) + total.data
        return TensorHandle(product.astype(total.data.dtype), total.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
