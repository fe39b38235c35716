"""Callbacks after an import: once, in order, and without importing anything themselves."""

from __future__ import annotations

import importlib
import sys

import pytest

import hf_attn_plugins
from hf_attn_plugins.hf.import_hooks import forget, when_imported


@pytest.fixture
def name(tmp_path, monkeypatch):
    (tmp_path / "lazy_example.py").write_text("VALUE = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "lazy_example"
    sys.modules.pop("lazy_example", None)


def test_it_waits_for_the_import_and_runs_after_it(name):
    seen, before = [], list(sys.meta_path)
    when_imported(name, lambda: seen.append(sys.modules[name].VALUE))
    assert not seen and name not in sys.modules
    assert importlib.import_module(name).VALUE == 3
    assert seen == [3] and sys.meta_path == before
    importlib.reload(sys.modules[name])
    assert seen == [3]


def test_one_action_a_module_and_it_can_be_forgotten(name):
    seen = []
    for i in range(2):
        when_imported(name, lambda i=i: seen.append(i))
    importlib.import_module(name)
    assert seen == [1]
    del sys.modules[name]
    when_imported(name, lambda: seen.append(2))
    forget(name)
    importlib.import_module(name)
    assert seen == [1]


def test_a_module_that_is_there_already(name):
    importlib.import_module(name)
    seen = []
    when_imported(name, lambda: seen.append(1))
    assert seen == [1]


def test_registering_twice_adds_nothing(name):
    hf_attn_plugins.register()
    once = len(sys.meta_path)
    hf_attn_plugins.register()
    assert len(sys.meta_path) == once
