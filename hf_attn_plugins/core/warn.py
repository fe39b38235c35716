"""Warnings of the package, each logged once per process."""

from __future__ import annotations

import logging

_WARNED: set[str] = set()


def warn_once(message: str) -> None:
    """Log `message` as a warning of logger "hf_attn_plugins", unless this process has logged the same text before."""
    if message not in _WARNED:
        _WARNED.add(message)
        logging.getLogger("hf_attn_plugins").warning(message)


def forget_warnings() -> None:
    """Let every warning be logged again; for tests."""
    _WARNED.clear()
