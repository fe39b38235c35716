"""Callbacks after an import: once, in order, and without importing anything themselves."""

from __future__ import annotations

import importlib
import sys

import pytest

from hf_attn_plugins.lazily import after_import, register_lazily


@pytest.fixture
def name(tmp_path, monkeypatch):
    (tmp_path / "lazy_example.py").write_text("VALUE = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "lazy_example"
    sys.modules.pop("lazy_example", None)


def test_it_waits_for_the_import_and_runs_after_it(name):
    seen, before = [], list(sys.meta_path)
    after_import(name, "VALUE", lambda: seen.append(sys.modules[name].VALUE))
    assert not seen and name not in sys.modules
    assert importlib.import_module(name).VALUE == 3
    assert seen == [3] and sys.meta_path == before
    importlib.reload(sys.modules[name])
    assert seen == [3]


def test_two_callbacks_on_one_module_both_run(name):
    seen = []
    for i in range(2):
        after_import(name, "VALUE", lambda i=i: seen.append(i))
    importlib.import_module(name)
    assert sorted(seen) == [0, 1]


def test_a_module_that_is_there_already(name):
    importlib.import_module(name)
    seen = []
    after_import(name, "VALUE", lambda: seen.append(1))
    assert seen == [1]


def test_registering_twice_adds_nothing(name):
    register_lazily()
    once = list(sys.meta_path)
    register_lazily()
    assert sys.meta_path == once
