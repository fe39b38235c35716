"""MkDocs hook: the site takes pages from other folders of the repository, and links to files there keep working.

In the repository a link is a relative path, as GitHub shows it. On the site a file lies elsewhere (`PAGES`), or is
copied below `files/`. This file uses no package, so tests can read `PAGES` without MkDocs.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = "benchmarks/results"

# Page of the site: file of the repository. All other pages are the files of docs/.
PAGES = {
    "index.md": "README.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
    "security.md": "SECURITY.md",
    "examples.md": "examples/README.md",
    "examples/lm_eval.md": "examples/lm_eval/README.md",
    "reference/eval.md": "eval/README.md",
    "reference/kernels.md": "hf_attn_plugins/kernels/README.md",
    "reference/patches.md": "patches/README.md",
    "results/default.md": f"{RESULTS}/default/report.md",
    "results/amx.md": f"{RESULTS}/amx/tiled.md",
    **{f"results/{path.name}": f"{RESULTS}/{path.name}" for path in sorted((ROOT / RESULTS).glob("*.md"))},
}
_SITE = {source: page for page, source in PAGES.items()}
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")
_CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def source_of(page: str) -> str:
    """The repository's file of a page of the site."""
    return PAGES.get(page, f"docs/{page}")


def site_path(source: str) -> str | None:
    """Where the site has a file of the repository; None for a folder, which no link can show."""
    if source in _SITE:
        return _SITE[source]
    if source.startswith("docs/"):
        return source.removeprefix("docs/")
    return f"files/{source}" if (ROOT / source).is_file() else None


def rewritten(text: str, page: str) -> tuple[str, set[str]]:
    """A page's Markdown with its links as the site needs them, and the files of the repository that have to be copied.

    Links inside of code blocks are left alone. A link to a folder becomes its text.
    """
    copied: set[str] = set()
    here = posixpath.dirname(source_of(page))

    def link(match: re.Match[str]) -> str:
        image, words, target, anchor = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        source = posixpath.normpath(posixpath.join(here, target))
        place = site_path(source)
        if place is None:
            return words
        if place.startswith("files/"):
            copied.add(source)
        return f"{image}[{words}]({posixpath.relpath(place, posixpath.dirname(page) or '.')}{anchor or ''})"

    parts = _CODE.split(text)
    parts[::2] = [_LINK.sub(link, part) for part in parts[::2]]
    return "".join(parts), copied


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of other folders, and every file that a page links to."""
    from mkdocs.structure.files import File

    for page, source in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    copied: set[str] = set()
    for file in files.documentation_pages():
        text = (ROOT / source_of(file.src_uri)).read_text(encoding="utf-8")
        copied |= rewritten(text, file.src_uri)[1]
    for source in sorted(copied):
        files.append(File.generated(config, f"files/{source}", abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite the links of a page."""
    return rewritten(markdown, page.file.src_uri)[0]
