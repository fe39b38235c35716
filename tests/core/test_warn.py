"""The same warning is logged once per process."""

from __future__ import annotations

import logging

import torch

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


def test_what_is_met_while_a_graph_is_traced_is_logged_too(caplog):
    def function(x):
        warn_once("met in a graph")
        return x + 1

    forget_warnings()
    torch.compiler.reset()
    graph = torch.compile(function, backend="eager", fullgraph=True)
    with caplog.at_level(logging.WARNING, logger="hf_attn_plugins"):
        assert graph(torch.zeros(2)).sum() == graph(torch.zeros(2)).sum() == 2
    assert [record.getMessage() for record in caplog.records] == ["met in a graph"]
