"""`python -m tests.docs.offline FOLDER`: a built site loads no script, style, font or picture from another host."""

from __future__ import annotations

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

_LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src"}
_LINKS = {"stylesheet", "icon", "preload", "preconnect", "prefetch", "manifest", "modulepreload"}
_IN_STYLES = re.compile(r"(?:url\(|@import\s+)\s*['\"]?((?:https?:)?//[^'\")\s]+)")


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        name = _LOADED.get(tag, "href" if tag == "link" and _LINKS & set((given.get("rel") or "").split()) else "")
        address = given.get(name) or ""
        if address.startswith(("http:", "https:", "//")):
            self.found.append(address)


def foreign(html: str) -> list[str]:
    """Addresses on other hosts that a page loads by itself; links that a reader may follow are none."""
    page = _Page()
    page.feed(html)
    return page.found + _IN_STYLES.findall(html)


def main(folder: Path) -> int:
    """Print what the site would load; 1 if there is anything."""
    pages = sorted(folder.rglob("*.html"))
    found = {str(path.relative_to(folder)): foreign(path.read_text(encoding="utf-8")) for path in pages}
    for path in sorted(folder.rglob("*.css")):
        found[str(path.relative_to(folder))] = _IN_STYLES.findall(path.read_text(encoding="utf-8"))
    bad = {name: addresses for name, addresses in found.items() if addresses}
    for name, addresses in bad.items():
        print(f"{name} loads {', '.join(sorted(set(addresses)))}")
    print(f"{len(pages)} pages in {folder}: {'not ' if bad else ''}readable offline")
    return int(bool(bad) or not pages)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
