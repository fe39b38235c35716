"""How reports look in a notebook: the table of `_repr_html_`, from the same words as `str`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape


class Shown:
    """An object whose `str` is for people: a notebook shows that text as it stands."""

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"


def html_table(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str] = (), words: int = 1
) -> str:
    """A table, title above and notes below it: the first `words` columns to the left, the others to the right."""
    align = ["left"] * words + ["right"] * (len(heads) - words)

    def cells(tag: str, words: Sequence[str]) -> str:
        made = (f'<{tag} style="text-align:{side}">{escape(word)}</{tag}>' for side, word in zip(align, words))
        return f"<tr>{''.join(made)}</tr>"

    body = "".join(cells("td", row) for row in rows)
    said = "".join(f"<div>{escape(note)}</div>" for note in notes)
    return (
        f"<div><strong>{escape(title)}</strong></div><table><thead>{cells('th', heads)}</thead>"
        f"<tbody>{body}</tbody></table>{said}"
    )


def text_table(heads: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """The lines of a table in plain text: the first `words` columns to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(heads, *rows)]
    return [
        "  ".join(
            cell.ljust(width) if i < words else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in (heads, *rows)
    ]
