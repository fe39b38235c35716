"""The pages name files that exist, and link to what is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "eval/README.md", "patches/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]
PLACES = (ROOT, ROOT / "hf_attn_plugins")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_in_backticks_exist(page):
    named = set(re.findall(r"`((?:[a-z_]+/)+[a-z_]*(?:\.py|\.md)?)`", page.read_text(encoding="utf-8")))
    gone = {"results/"} if page.name == "CHANGELOG.md" else set()
    yours = {name for name in named if "my_" in name}
    missing = [n for n in sorted(named - gone - yours) if not any((place / n).exists() for place in PLACES)]
    assert not missing, missing


def test_the_glossary_is_sorted_and_complete():
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    terms = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][1:]
    assert terms == sorted(terms) and len(terms) >= 30
