"""Tables and labels of report.html as HTML."""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape

from ..tables import Table


def table(
    content: Table, kind: str = "", names: Mapping[str, str] | None = None, rulers: Mapping[str, str] | None = None
) -> str:
    """A table in a box that scrolls sideways.

    Args:
        kind: its CSS class.
        names: row's label -> HTML in place of the label.
        rulers: row's label -> drawing before the cell of the difference.
    """
    heads = "".join(
        f'<th scope="col"{"" if i < content.words else " class=number"}>{escape(head)}</th>'
        for i, head in enumerate(content.heads)
    )
    body = ""
    for row in content.rows:
        label = row[0]
        body += f'<tr><th scope="row"><div>{(names or {}).get(label, breakable(label))}</div></th>'
        for index, (head, text) in enumerate(zip(content.heads[1:], row[1:]), 1):
            ruler = (rulers or {}).get(label, "") if head.startswith("difference") else ""
            style = "" if index < content.words else " class=number"
            body += f'<td{style} data-head="{escape(head)}">{ruler}<span>{breakable(text)}</span></td>'
        body += "</tr>"
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{escape(content.title)}"><table class="{kind}">'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def side_by_side(content: Table) -> str:
    """The headline turned, one column for each attention: what a phone shows, so that attentions can be compared."""
    turned = [list(cells) for cells in zip(content.heads, *content.rows)]
    return table(Table(f"{content.title}, side by side", ["", *turned[0][1:]], turned[1:]), "turned")


def folded(content: Table) -> str:
    """A table behind its title; open on paper."""
    note = f'<p class="note">{escape(content.note)}</p>' if content.note else ""
    rows = f'<span class="count">{len(content.rows)} rows</span>'
    return f"<details class=folded><summary>{escape(content.title)} {rows}</summary>{note}{table(content)}</details>"


def breakable(text: str) -> str:
    """A label may break before its options."""
    return re.sub(r"([:,/])(?=\w)", r"\1<wbr>", escape(text))
