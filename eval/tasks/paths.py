"""Lists of paths with commas between them, where a path may hold commas itself."""

from __future__ import annotations

from pathlib import Path


def split_paths(text: str) -> list[str]:
    """The entries of a comma-separated list: from the left, the longest run of words that is an existing path wins.

    An entry may begin with a name and "=", as in "longbench=data/a,b": then what follows the sign is the path. Words
    that are no part of an existing path are entries of their own; empty ones are left out.
    """
    words, entries, at = text.split(","), [], 0
    while at < len(words):
        end = next((end for end in range(len(words), at + 1, -1) if _exists(",".join(words[at:end]))), at + 1)
        entries.append(",".join(words[at:end]))
        at = end
    return [entry for entry in entries if entry]


def _exists(entry: str) -> bool:
    try:
        return any(path and Path(path).exists() for path in (entry, entry.partition("=")[2]))
    except (OSError, ValueError):  # too long for a name, or a null in it
        return False
