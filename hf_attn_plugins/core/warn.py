"""Warnings of the package, each logged once per process."""

from __future__ import annotations

import logging

import torch

_WARNED: set[str] = set()


def warn_once(message: str) -> None:
    """Log `message` as a warning of logger "hf_attn_plugins", unless this process has logged the same text before.

    While torch.compile traces a graph, the trace logs it, and the graph does not.
    """
    _logged(message)


# torch.compile cannot trace a log call: it calls this once and keeps the result as a constant.
@torch.compiler.assume_constant_result
def _logged(message: str) -> bool:
    if message not in _WARNED:
        _WARNED.add(message)
        logging.getLogger("hf_attn_plugins").warning(message)
    return True


def forget_warnings() -> None:
    """Let every warning be logged again; for tests."""
    _WARNED.clear()
