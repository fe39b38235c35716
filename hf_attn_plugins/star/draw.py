"""Pictures of a plan: characters for a terminal, a PNG with matplotlib."""

from __future__ import annotations

from pathlib import Path

from hf_attn_plugins.star.plan import Plan

MAX_CELLS = 4096  # side of a picture, in tokens; a larger one would hold more cells than a screen has pixels
_GLYPHS = {"": " ", "hidden": ".", "block": "#", "halo": "h", "anchor": "a", "query": "q"}
_COLOURS = {
    "": "#ffffff",
    "hidden": "#eeeeee",
    "block": "#3b6fb6",
    "halo": "#5fa08f",
    "anchor": "#8fb8de",
    "query": "#e08a3c",
}


def kind(plan: Plan, position: int, key: int) -> str:
    """What a cell is: "" (in the future), "hidden", "block", "halo" or "anchor" (phase 1), or "query" (phase 2)."""
    if key > position:
        return ""
    phase = plan.phase(position, key)
    if phase != 1:
        return "query" if phase else "hidden"
    if position // plan.block_size == key // plan.block_size:
        return "block"
    return "halo" if key in plan.near(position // plan.block_size) else "anchor"


def text(plan: Plan) -> str:
    """The plan in characters, a line a token: # own block, h halo, a anchor, q query, . hidden."""
    tokens = range(plan.length)
    return "\n".join("".join(_GLYPHS[kind(plan, i, j)] for j in tokens).rstrip() for i in tokens)


def picture(plan: Plan, path: str | Path) -> None:
    """Write the attended cells as an image, phase 1 in blues and green, phase 2 in orange.

    Raises:
        ImportError: matplotlib is missing; ValueError: no token, or more than `MAX_CELLS`.
    """
    if not 0 < plan.length <= MAX_CELLS:
        raise ValueError(
            f"length={plan.length}: a picture needs 1 .. {MAX_CELLS} tokens; scale all sizes down together."
        )
    try:
        import matplotlib
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: pip install 'hf-attn-plugins[demo]'.") from error
    kinds = list(_COLOURS)
    tokens = range(plan.length)
    cells = [[kinds.index(kind(plan, i, j)) for j in tokens] for i in tokens]
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(6, 6.4))
        axes = figure.add_subplot()
        axes.imshow(
            cells, cmap=ListedColormap(list(_COLOURS.values())), vmin=0, vmax=len(kinds) - 1, interpolation="nearest"
        )
        axes.set(
            xlabel="key",
            ylabel="token",
            title=f"{plan.num_blocks} blocks of {plan.block_size}, halo {plan.halo_size}, anchor {plan.anchor_size}",
        )
        names = {
            "block": "phase 1: own block",
            "halo": "phase 1: halo",
            "anchor": "phase 1: anchor",
            "query": "phase 2: query",
            "hidden": "not attended",
        }
        handles = [Patch(facecolor=_COLOURS[name], label=label) for name, label in names.items()]
        figure.legend(handles=handles, loc="lower center", ncols=2, frameon=False)
        figure.subplots_adjust(bottom=0.2)
        figure.savefig(path, dpi=150)
