"""The same warning is logged once per process."""

from __future__ import annotations

import logging

from hf_attn_plugins.core.warn import forget_warnings, warn_once


def test_each_text_is_logged_once(caplog):
    forget_warnings()
    with caplog.at_level(logging.WARNING, logger="hf_attn_plugins"):
        for text in ("a", "b", "a", "a"):
            warn_once(text)
    assert [record.getMessage() for record in caplog.records] == ["a", "b"]
    forget_warnings()
    with caplog.at_level(logging.WARNING, logger="hf_attn_plugins"):
        warn_once("a")
    assert [record.getMessage() for record in caplog.records] == ["a", "b", "a"]
