"""A model in evaluation mode for the length of a `with` block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in evaluation mode; on exit every module has the mode it had before.

    Each module's own mode is kept: `model.train(True)` would also switch on a sub-module that the user had put in
    evaluation mode.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
