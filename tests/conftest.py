"""What every test shares: Triton's interpreter where there is no GPU, and the same random numbers in every run."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is first imported, which Transformers may do: so it is set before any test file is collected.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
