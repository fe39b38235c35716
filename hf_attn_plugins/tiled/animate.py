"""The tiled forward pass as an animation (matplotlib and Pillow, imported when needed)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_attn_plugins.tiled.draw import FULL, INK, NOW, SKIPPED, grid, new_figure, rectangle, write
from hf_attn_plugins.tiled.plan import TilePlan
from hf_attn_plugins.tiled.walkthrough import Forward, TileStep

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

MAX_LENGTH = 48
MAX_FRAMES = 240
LAST_FRAMES = 4  # frames that show the finished picture
LEGEND = {"columnspacing": 1.0, "handlelength": 1.2, "handletextpad": 0.5}
COLUMNS = {"row": 0.3, "max": 1.2, "sum": 2.2, "old times": 3.3}


def animate(plan: TilePlan, done: Forward, value: Tensor, path: Path) -> None:
    """Write a GIF with one frame per tile; a tile of the last row block has one frame per key.

    Args:
        plan: the tiles.
        done: `walkthrough.forward` of this plan.
        value: (N, d).

    Raises:
        ValueError: the plan has too many tokens or frames, or the file cannot be written.
    """
    check_animation(plan)
    from matplotlib.animation import FuncAnimation, PillowWriter

    figure = new_figure(12.5, 5.3)
    scene, frames = _Scene(figure, plan, done, value), list(_frames(plan, done))
    # Without an init_func matplotlib would draw frame 0 a second time.
    film = FuncAnimation(figure, lambda index: scene.show(*frames[index]), frames=len(frames), init_func=tuple)
    write(path, lambda: film.save(path, writer=PillowWriter(fps=1), dpi=76))


def check_animation(plan: TilePlan) -> None:
    """Refuse an animation that is too large.

    Raises:
        ValueError: too many tokens or too many frames.
    """
    if plan.length > MAX_LENGTH:
        raise ValueError(
            f"--animate: a frame shows at most {MAX_LENGTH} rows, not {plan.length}; give a smaller --length."
        )
    count = num_frames(plan)
    if count > MAX_FRAMES:
        raise ValueError(f"--animate: {count} frames are more than {MAX_FRAMES}; give a larger --sram.")


def num_frames(plan: TilePlan) -> int:
    """One frame per tile, but one per key for tiles of the last row block, and `LAST_FRAMES` at the end."""
    return plan.count()[0] - plan.num_key_blocks + plan.length + LAST_FRAMES


def _frames(plan: TilePlan, done: Forward) -> Iterator[tuple[int, int]]:
    """(step, keys of its tile that are added to the last row); step len(done.steps) is the finished picture."""
    for index, step in enumerate(done.steps):
        if plan.length - 1 in step.tile.rows:
            yield from ((index, added) for added in range(1, len(step.tile.keys) + 1))
        else:
            yield index, 0
    yield from [(len(done.steps), 0)] * LAST_FRAMES


class _Scene:
    """Three panels: the tiles; row maximum and row sum of each row; the last row's weighted values, key by key."""

    def __init__(self, figure: Figure, plan: TilePlan, done: Forward, value: Tensor) -> None:
        self.figure, self.plan, self.done, self.value = figure, plan, done, value
        self.tiles, self.kept, self.arrows = figure.subplots(1, 3)
        figure.subplots_adjust(left=0.05, right=0.985, top=0.79, bottom=0.2, wspace=0.2)
        corners = [corner for step in self._of_last_row(len(done.steps)) for corner in self._path(step, None)]
        reach = torch.stack([*corners, _plane(done.out[-1])]).abs().max().item()
        self.limits = (-1.15 * reach, 1.15 * reach) if reach else (-1.0, 1.0)

    def show(self, index: int, added: int) -> Iterable[Artist]:
        """Draw the state after step `index`, with `added` keys of its tile added to the last row."""
        over = index == len(self.done.steps)
        for axes in (self.tiles, self.kept, self.arrows):
            axes.clear()
        self._show_tiles(index)
        self._show_kept(index)
        self._show_arrows(index, added)
        title = "Done: every row holds its softmax mean, and never more than one tile of scores existed."
        if not over:
            tile = self.done.steps[index].tile
            title = f"Step {index + 1} of {len(self.done.steps)}: {tile.describe()}"
        self.figure.suptitle(title, fontsize=14, x=0.05, y=0.97, ha="left", color=INK)
        return ()

    def _show_tiles(self, index: int) -> None:
        axes = self.tiles
        grid(axes, self.plan)
        axes.set_title("scores, one tile at a time", fontsize=11, pad=20)
        axes.set_facecolor(SKIPPED)
        for number, step in enumerate(self.done.steps):
            colour = NOW if number == index else FULL if number < index else "white"
            rectangle(axes, step.tile, colour, edge=SKIPPED, alpha=0.35 if number < index else 1.0)
        if index < len(self.done.steps) and self.plan.length <= 12:
            self._write_scores(self.done.steps[index])

    def _write_scores(self, step: TileStep) -> None:
        for i, row in enumerate(step.tile.rows):
            for j, key in enumerate(step.tile.keys):
                score = step.scores[i, j].item()
                text = "hidden" if score == -torch.inf else f"{score:.1f}"
                size = 7 if self.plan.length > 8 or score == -torch.inf else 9
                self.tiles.text(key, row, text, ha="center", va="center", color="white", fontsize=size)

    def _show_kept(self, index: int) -> None:
        axes, n = self.kept, self.plan.length
        axes.set_xlim(0, 4)
        axes.set_ylim(n - 0.5, -0.5)
        axes.set_axis_off()
        axes.set_title("what each row keeps", fontsize=11, pad=20)
        for name, x in COLUMNS.items():
            axes.annotate(name, (x, 1.02), xycoords=("data", "axes fraction"), ha="center", fontsize=9, color="grey")
        for row in range(n):
            seen = [step for step in self.done.steps[: index + 1] if row in step.tile.rows]
            now = index < len(self.done.steps) and row in self.done.steps[index].tile.rows
            style = {"color": NOW if now else INK, "weight": "bold" if now else "normal", "size": min(11.0, 190 / n)}
            for x, text in zip(COLUMNS.values(), self._cells(row, seen, now), strict=True):
                axes.text(x, row, text, ha="center", va="center", **style)

    def _cells(self, row: int, seen: list[TileStep], now: bool) -> list[str]:
        if not seen:
            return [str(row), "none", "0", ""]
        step, at = seen[-1], row - seen[-1].tile.rows.start
        rescaled = f"{step.rescale[at]:.2f}" if now and len(seen) > 1 else ""
        return [str(row), f"{step.max_after[at]:.2f}", f"{step.sum_after[at]:.2f}", rescaled]

    def _show_arrows(self, index: int, added: int) -> None:
        axes = self.arrows
        axes.set_xlim(*self.limits)
        axes.set_ylim(*self.limits)
        axes.set_aspect("equal")
        axes.grid(True, color=SKIPPED, lw=0.6)
        axes.tick_params(labelsize=8)
        axes.set_title(f"row {self.plan.length - 1}: sum of weight × value", fontsize=11, pad=20)
        if self.plan.head_dim > 2:
            axes.set_xlabel("the first two elements of each value", fontsize=9)
        axes.plot(*_plane(self.done.out[-1]).tolist(), "x", ms=11, mew=2.5, color=INK, label="plain softmax")
        axes.plot([], [], color=FULL, lw=2.5, label="earlier tiles, rescaled")
        axes.plot([], [], color=NOW, lw=2.5, label="this tile's keys")
        axes.legend(loc="upper right", bbox_to_anchor=(1.03, -0.14), ncols=3, fontsize=7.5, frameon=False, **LEGEND)
        seen = self._of_last_row(index + 1)
        if seen and not added:
            self._arrow(torch.zeros(2), _plane(seen[-1].mean[-1]), FULL)
        elif seen:
            self._add_up(seen[-1], added)

    def _add_up(self, step: TileStep, added: int) -> None:
        tips = self._path(step, added)
        self._arrow(torch.zeros(2), tips[0], FULL)
        for start, end in itertools.pairwise(tips):
            self._arrow(start, end, NOW)
        share = step.weights[-1, added - 1] / step.sum_after[-1]
        text = f"+ {share.item():.2f} × value {step.tile.keys[added - 1]}"
        self.arrows.annotate(text, (0.97, 0.03), xycoords="axes fraction", ha="right", fontsize=11, color=NOW)

    def _path(self, step: TileStep, added: int | None) -> list[Tensor]:
        """The last row's mean from the earlier tiles alone, then after each key of this tile, as points."""
        earlier = [s for s in self._of_last_row(len(self.done.steps)) if s.tile.key_block < step.tile.key_block]
        tip = torch.zeros(2, dtype=self.value.dtype)
        if earlier:
            tip = _plane(earlier[-1].mean[-1]) * (step.sum_before[-1] * step.rescale[-1] / step.sum_after[-1])
        tips = [tip]
        for key, weight in list(zip(step.tile.keys, step.weights[-1], strict=True))[:added]:
            tips.append(tips[-1] + _plane(self.value[key]) * (weight / step.sum_after[-1]))
        return tips

    def _of_last_row(self, end: int) -> list[TileStep]:
        return [step for step in self.done.steps[:end] if self.plan.length - 1 in step.tile.rows]

    def _arrow(self, start: Tensor, end: Tensor, colour: str) -> None:
        if (end - start).norm() < 0.004 * self.limits[1]:
            return  # too short: only an arrow head would be drawn, in an arbitrary direction
        style = {"arrowstyle": "-|>", "color": colour, "lw": 2, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 11}
        self.arrows.annotate("", xy=end.tolist(), xytext=start.tolist(), arrowprops=style)


def _plane(vectors: Tensor) -> Tensor:
    """The first two elements of each vector; the second is 0 if there is only one."""
    two = vectors[..., :2]
    return torch.cat([two, torch.zeros_like(two)], -1)[..., :2]
