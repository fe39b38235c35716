"""mkdocs.yml names what exists, every page has a place in it, and links lead somewhere on the site too."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import posixpath
import re
import subprocess
import sys
from typing import Any

import pytest
import yaml

import hf_attn_plugins as hap
from tests.docs.blocks import ROOT
from tests.docs.offline import foreign

DOCS = ROOT / "docs"


def hooks() -> Any:
    spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOOKS = hooks()
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))


def named(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [page for part in (nav.values() if isinstance(nav, dict) else nav) for page in named(part)]


def test_the_navigation_names_every_page_once_and_nothing_else():
    pages = {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} | set(HOOKS.PAGES)
    assert sorted(named(CONFIG["nav"])) == sorted(pages)


def test_pages_of_other_folders_exist_and_hide_none_of_docs():
    for page, source in HOOKS.PAGES.items():
        assert (ROOT / source).is_file(), source
        assert not (DOCS / page).exists(), page


@pytest.mark.parametrize("page", named(CONFIG["nav"]))
def test_links_lead_somewhere_on_the_site(page):
    text, copied = HOOKS.rewritten((ROOT / HOOKS.source_of(page)).read_text(encoding="utf-8"), page)
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S)):
        if "://" in target:
            continue
        place = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        known = place in HOOKS.PAGES or (DOCS / place).is_file() or place.removeprefix("files/") in copied
        assert known, f"{page}: {target}"


def test_links_are_rewritten_by_place():
    text = "[a](../architecture.md#x) ![p](../pictures/star.png) [log](../../CHANGELOG.md) [web](https://x.org/a.md)\n"
    text += "[code](../../hf_attn_plugins/plugins.py) [folder](../../benchmarks)\n```\n[in](../code)\n```\n"
    made, copied = HOOKS.rewritten(text, "methods/star.md")
    assert "[a](../architecture.md#x) ![p](../pictures/star.png) [log](../changelog.md)" in made
    assert "[web](https://x.org/a.md)" in made and " folder\n" in made and "[in](../code)" in made
    assert "[code](../files/hf_attn_plugins/plugins.py)" in made
    assert copied == {"hf_attn_plugins/plugins.py"}


def test_what_a_page_would_load_from_elsewhere_is_found():
    assert foreign('<a href="https://x.org">x</a> <img src="a.png"> <link rel="canonical" href="https://x.org">') == []
    assert foreign('<script src="https://x.org/a.js"></script>') == ["https://x.org/a.js"]
    assert foreign('<link rel="stylesheet" href="//x.org/a.css"><style>a{b:url(http://x.org/f)}</style>') == [
        "//x.org/a.css", "http://x.org/f",
    ]  # fmt: skip


def test_the_api_page_names_what_exists():
    for name in re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE):
        module, _, attribute = name.rpartition(".")
        assert getattr(importlib.import_module(module), attribute).__doc__, name


def test_the_api_page_names_every_verb():
    named = re.findall(r"^::: \S+\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), re.MULTILINE)
    verbs = {name for name in hap.__all__ if inspect.isfunction(getattr(hap, name))} - {"plugins", "register"}
    assert verbs <= set(named), verbs - set(named)


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_loads_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    check = [sys.executable, "-m", "tests.docs.offline", str(tmp_path / "site")]
    assert subprocess.run(check, cwd=ROOT).returncode == 0
