"""What every test shares: Triton's interpreter without a GPU, no network, and the same random numbers in every run."""

from __future__ import annotations

import gc
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


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
