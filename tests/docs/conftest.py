"""A tiny model in the place of the small real one, for pages and notebooks that name it by `hap.demo_folder()`."""

from __future__ import annotations

from pathlib import Path

import pytest

import hf_attn_plugins as hap
from tests.eval.tiny import model_folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def tiny_demo(tiny, monkeypatch) -> Path:
    """`hap.demo_folder()` gives a tiny random model and its tokenizer."""
    monkeypatch.setattr(hap, "demo_folder", lambda: tiny)
    return tiny
