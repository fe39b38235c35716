"""The tile schedule of `tiled.plan` as a picture (matplotlib, imported when needed)."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hf_attn_plugins.tiled.plan import ORDERS, Tile, TilePlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_DRAWN_TILES = 4096
FULL, MASKED, SKIPPED, NOW, INK = "#4c78a8", "#f2a65a", "#e4e4e4", "#d1495b", "#222222"
TITLES = {
    "keys-outer": "keys outermost (FlashAttention)",
    "rows-outer": "rows outermost (FlashAttention-2)",
}


def check_target(path: Path, suffix: str) -> None:
    """Check that a picture can be written, before any work is done.

    Raises:
        ValueError: the path has another suffix or is a directory, or a library to draw with is not installed.
        FileNotFoundError: the folder does not exist.
    """
    if path.suffix.lower() != suffix:
        raise ValueError(f"{path}: the file name must end in {suffix}.")
    if path.is_dir():
        raise ValueError(f"{path} is a directory: give the name of a file.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: the folder {path.parent} does not exist; create it first.")
    for module in ("matplotlib", "PIL"):
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ValueError(f"drawing needs {module}: pip install 'hf-attn-plugins[demo]'.") from error


def draw_schedule(plan: TilePlan, path: Path) -> None:
    """Write a PNG of both tile orders side by side: computed, masked and skipped tiles, and their sequence.

    Raises:
        ValueError: the plan has more tiles than a picture can show, or the file cannot be written.
    """
    if plan.num_row_blocks * plan.num_key_blocks > MAX_DRAWN_TILES:
        raise ValueError(
            f"--draw: {plan.num_row_blocks} x {plan.num_key_blocks} tiles are more than the {MAX_DRAWN_TILES} a "
            "picture can show; give a smaller --length or a larger --sram."
        )
    figure = new_figure(11.0, 5.9)
    for place, order in enumerate(ORDERS, 1):
        axes = figure.add_subplot(1, 2, place)
        _draw_order(axes, dataclasses.replace(plan, order=order))
    _legend(figure, plan)
    figure.suptitle(
        f"{plan.length} tokens, head_dim {plan.head_dim}, SRAM {plan.sram}: "
        f"blocks of {plan.block_rows} rows and {plan.block_keys} keys" + (", causal" if plan.causal else ""),
        fontsize=13,
    )
    figure.subplots_adjust(left=0.07, right=0.98, top=0.86, bottom=0.19, wspace=0.2)
    write(path, lambda: figure.savefig(path, dpi=110))


def _draw_order(axes: Axes, plan: TilePlan) -> None:
    tiles = list(plan.tiles())
    grid(axes, plan)
    axes.set_title(TITLES[plan.order], fontsize=11)
    axes.set_facecolor(SKIPPED if plan.causal else "white")
    numbered = _numbered(plan)
    for number, tile in enumerate(tiles, 1):
        # Without numbers, the shade shows the sequence: later tiles are darker.
        shade = 1.0 if numbered else 0.3 + 0.7 * number / len(tiles)
        rectangle(axes, tile, MASKED if tile.masked else FULL, edge="white" if numbered else "none", alpha=shade)
        if numbered:
            x, y = _centre(tile)
            axes.text(x, y, str(number), ha="center", va="center", color="white", fontsize=11 if len(tiles) < 50 else 7)


def _numbered(plan: TilePlan) -> bool:
    return plan.num_row_blocks <= 16 and plan.num_key_blocks <= 16


def new_figure(width: float, height: float) -> Figure:
    """An empty figure without a window; width and height in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    empty = Figure(figsize=(width, height))
    FigureCanvasAgg(empty)
    return empty


def grid(axes: Axes, plan: TilePlan) -> None:
    """Set up axes with keys to the right and query rows downwards."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.5, plan.length - 0.5)
    axes.set_ylim(plan.length - 0.5, -0.5)
    axes.set_aspect("equal")
    axes.set_xlabel("key")
    axes.set_ylabel("query row")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=12, integer=True))


def rectangle(axes: Axes, tile: Tile, colour: str, edge: str, alpha: float = 1.0) -> None:
    """Draw one tile."""
    from matplotlib.patches import Rectangle

    corner = (tile.keys.start - 0.5, tile.rows.start - 0.5)
    axes.add_patch(Rectangle(corner, len(tile.keys), len(tile.rows), fc=colour, ec=edge, lw=0.8, alpha=alpha))


def _centre(tile: Tile) -> tuple[float, float]:
    return (tile.keys[0] + tile.keys[-1]) / 2, (tile.rows[0] + tile.rows[-1]) / 2


def _legend(figure: Figure, plan: TilePlan) -> None:
    from matplotlib.patches import Patch

    entries = [
        Patch(
            color=FULL, label="computed; " + ("the number is its turn" if _numbered(plan) else "the later the darker")
        )
    ]
    if plan.causal:
        entries += [Patch(color=MASKED, label="computed with a mask"), Patch(color=SKIPPED, label="skipped")]
    figure.legend(handles=entries, loc="lower center", ncols=3, frameon=False, fontsize=10)


def write(path: Path, save: Callable[[], object]) -> None:
    """Call `save`, which writes the file `path`.

    Raises:
        ValueError: the file cannot be written; the message names it.
    """
    try:
        save()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror or error}).") from error
