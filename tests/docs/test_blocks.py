"""Every page's Python blocks run as they stand, on a tiny model; README and add_a_method.md have tests of their own."""

from __future__ import annotations

import pytest

from tests.docs.blocks import ROOT, blocks, run

PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.name != "add_a_method.md" and blocks(path)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_blocks_of_a_page_run(page, tiny_demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"runs": tmp_path / "runs"}
    if page.name == "tuning.md":  # the page is about a model that the reader has loaded
        names |= model_to_tune(tiny_demo)
    assert run(page, names), "the page prints something"


def model_to_tune(folder):
    """A model, and `tune` at a length and with texts that fit a tiny one; the options are those of the page."""
    import functools
    import types

    from transformers import AutoModelForCausalLM

    import hf_attn_plugins as hap

    def tune(model, name, *, length, min_speedup):
        return hap.tune(model, name, length=256, max_share=0.9, texts=2, rounds=1, heads=False)

    return {
        "model": AutoModelForCausalLM.from_pretrained(folder),
        "hap": types.SimpleNamespace(tune=functools.wraps(hap.tune)(tune)),
    }


def test_the_methods_pages_show_how_to_use_them():
    for path in sorted((ROOT / "docs" / "methods").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        assert blocks(path), path.name
        for heading in ("## Use", "## Limits", "## Paper"):
            assert heading in text, f"{path.name} has no {heading!r}"
