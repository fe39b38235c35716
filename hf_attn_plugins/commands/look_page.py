"""The page of `hf-attn look`: verdicts, heat maps of heads, and the text with its changed predictions. One file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path

from hf_attn_plugins.eval.report.page import page as report
from hf_attn_plugins.eval.report.wording.findings import SAME
from hf_attn_plugins.hf.look.by_token import Changes
from hf_attn_plugins.hf.look.reach import FIRST, WINDOWS, HeadReach
from hf_attn_plugins.star.plan import Plan

LEVELS = (0.01, 0.1, 1.0)  # nats from which on a token is coloured, and coloured more
SOME = 0.1  # a head that loses so much of its weight is named in the verdict
LEGEND = (
    '<ul class="key"><li><span class="k1">0.01 to 0.1 nats</span></li><li><span class="k2">0.1 to 1</span></li>'
    '<li><span class="k3">1 and more</span></li><li><u>another first choice</u></li>'
    "<li><i>&nbsp;start of a block</i></li></ul>"
)


def page(
    facts: Mapping[str, str],
    tokens: Sequence[str],
    heads: Sequence[HeadReach],
    plan: Plan,
    found: Mapping[str, Changes],
    choices: Mapping[int, str],
) -> str:
    """The page as HTML, with style and data inside.

    Args:
        facts: what was looked at, and on what: "model" for the title, the others for the line under it, as they are.
        tokens: the text, token by token.
        heads: the reach of every key head; what is hidden is so by `plan`.
        plan: star's plan of this text.
        found: what each attention changes, by its label.
        choices: the texts of the token ids that predictions choose.
    """
    style = (Path(report.__file__).parent / "page.css").read_text(encoding="utf-8")
    style += (Path(__file__).parent / "look.css").read_text(encoding="utf-8")
    about = " · ".join(value for name, value in facts.items() if name != "model")
    parts = {
        "kicker": "How far heads look, and where predictions change",
        "title": escape(f"Inside {facts['model']}"),
        "style": style,
        "about": escape(about),
        "body": _verdicts(heads, plan, found) + _grids(heads, plan) + _texts(tokens, plan, found, choices),
        "data": "{}",
        "script": "",
    }
    return report.filled(parts)


def _verdicts(heads: Sequence[HeadReach], plan: Plan, found: Mapping[str, Changes]) -> str:
    lines = [f"<p>{escape(sentence)}</p>" for sentence in [hidden(heads, plan)]]
    lines += [f"<p><strong>{escape(label)}</strong>: {escape(changed(each))}</p>" for label, each in found.items()]
    return f'<section id="verdict"><h2>In short</h2>{"".join(lines)}</section>'


def hidden(heads: Sequence[HeadReach], plan: Plan) -> str:
    """One sentence on what the plan hides from which heads."""
    if plan.is_dense:
        return f"Star's plan hides nothing of these {plan.length} tokens: take a longer text, or smaller blocks."
    sparse = [head for head in heads if not head.dense]
    losing = sorted((head for head in sparse if head.hidden >= SOME), key=lambda head: -head.hidden)
    mean = sum(head.hidden for head in sparse) / max(1, len(sparse))
    said = (
        f"Star's plan (blocks of {plan.block_size}, halo {plan.halo_size}, {plan.anchor_size} first tokens) hides "
        f"{plan_share(plan):.0%} of the pairs, and {mean:.1%} of an average head's attention."
    )
    if not losing:
        return f"{said} No head loses a tenth of its attention."
    names = ", ".join(f"layer {head.layer} head {head.head} ({head.hidden:.0%})" for head in losing[:4])
    rest = f" and {len(losing) - 4} more" if len(losing) > 4 else ""
    return (
        f"{said} {len(losing)} of {len(sparse)} key heads lose a tenth or more: {names}{rest}. "
        "Kept dense (hf-attn tune), they lose nothing."
    )


def plan_share(plan: Plan) -> float:
    """The share of causal pairs that a plan hides."""
    return 1 - plan.attended_pairs() / plan.causal_pairs()


def changed(found: Changes) -> str:
    """One sentence on what an attention changes, and how it is spread over the text."""
    total, count = float(found.kl.sum()), int(found.changed.sum())
    length = len(found.kl)
    mean = total / max(1, length - 1)
    said = f"{found.plan}. The first choice is another one for {count} of {length - 1} tokens; mean KL {mean:.4f} nats"
    if not total:
        return f"{said}: nothing changes."
    if mean < SAME:
        return f"{said}: no more than rounding to bfloat16 changes."
    ordered = found.kl.sort(descending=True).values.cumsum(0)
    few = int((ordered < total / 2).sum()) + 1
    return f"{said}, half of it in {few} token{'s' * (few != 1)} ({few / length:.1%} of the text)."


def _grids(heads: Sequence[HeadReach], plan: Plan) -> str:
    measures: list[tuple[str, Callable[[HeadReach], float]]] = [("hidden by star's plan", lambda head: head.hidden)]
    for index, window in enumerate(WINDOWS):
        if window < plan.length:
            measures.append((f"on the last {window} tokens", lambda head, index=index: head.within[index]))  # type: ignore[misc]
    measures.append((f"on the first {FIRST} tokens", lambda head: head.first))
    grids = "".join(_grid(title, heads, of) for title, of in measures)
    note = (
        "Share of attention in percent, by layer (rows) and key head (columns): means over rows spread evenly over the "
        "text and over the queries of a key head. Outlined: heads that the options keep dense."
    )
    return (
        f'<section id="heads"><h2>Where heads look</h2><p class="note">{note}</p><div class="grids">{grids}</div>'
        "</section>"
    )


def _grid(title: str, heads: Sequence[HeadReach], of: Callable[[HeadReach], float]) -> str:
    count = max(head.head for head in heads) + 1
    top = "".join(f'<th scope="col">{head}</th>' for head in range(count))
    rows = ""
    for layer, members in groupby(heads, key=lambda head: head.layer):
        cells = "".join(
            f'<td style="--w:{of(head):.2f}"{" class=dense" if head.dense else ""}>{100 * of(head):.0f}</td>'
            for head in members
        )
        rows += f'<tr><th scope="row">{layer}</th>{cells}</tr>'
    return (
        f"<figure><figcaption>{escape(title)}</figcaption><table><thead><tr><th></th>{top}</tr></thead>"
        f"<tbody>{rows}</tbody></table></figure>"
    )


def _texts(tokens: Sequence[str], plan: Plan, found: Mapping[str, Changes], choices: Mapping[int, str]) -> str:
    most = max(found, key=lambda label: float(found[label].kl.sum()), default=None)  # what the reader came for
    parts = "".join(
        f"<details{' open' if label == most else ''}><summary>{escape(label)}</summary>{LEGEND}"
        f'<div class="text" tabindex="0">{_text(tokens, plan, each, choices)}</div></details>'
        for label, each in found.items()
    )
    note = "A token's colour: KL between the two predictions for it. Rest the pointer on it to read both first choices."
    return f'<section id="text"><h2>Where predictions change</h2><p class="note">{note}</p>{parts}</section>'


def _text(tokens: Sequence[str], plan: Plan, found: Changes, choices: Mapping[int, str]) -> str:
    starts = set() if plan.is_dense else {block.start for block in plan.blocks()} - {0}
    parts = []
    different = found.changed.tolist()
    for index, (token, kl) in enumerate(zip(tokens, found.kl.tolist(), strict=True)):
        text, level = escape(token), sum(kl >= least for least in LEVELS)
        if different[index]:
            text = f"<u>{text}</u>"
        if level or different[index]:
            before, after = (choices.get(int(each[index]), "?") for each in (found.first, found.other))
            title = escape(f"KL {kl:.3f}; dense: {before!r}, here: {after!r}", quote=True)
            text = f'<span class="k{level}" title="{title}">{text}</span>'
        parts.append(f"<i></i>{text}" if index in starts else text)
    return "".join(parts)
