"""Charts as inline SVG: lines over length or position, a scatter, a heat map.

Colours are classes (`c0` the baseline, `c1` ... the others), so that the page's style sheet decides them for light,
dark and print; every series has a marker of its own too. Each chart carries a title and a description in words.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from .axes import Axis

WIDTH, HEIGHT = 360, 250
LEFT, RIGHT, TOP, BOTTOM = 46, 348, 34, 206
COLOURS = 6
DODGE = 5.0  # px between the series at one step: exact plugins lie on the baseline and would hide it

SHAPES = (  # around the origin, about as heavy as a disc of radius 1
    "M-1 0a1 1 0 1 0 2 0a1 1 0 1 0-2 0z",  # disc
    "M-.9-.9h1.8v1.8h-1.8z",  # square
    "M0-1.2l1.15 2.1h-2.3z",  # triangle
    "M0-1.3l1.3 1.3l-1.3 1.3l-1.3-1.3z",  # diamond
    "M0 1.2l1.15-2.1h-2.3z",  # triangle, point down
    "M-.4-1.1h.8v.7h.7v.8h-.7v.7h-.8v-.7h-.7v-.8h.7z",  # plus
    "M-1-1h2l-2 2h2z",  # hourglass
)

Cells = Mapping[tuple[int, int], tuple[float, str]]


@dataclass(frozen=True)
class Point:
    """A place in a chart, what it says when it is pointed at, and the ends of y's interval."""

    x: float
    y: float
    text: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """One attention's points; `number` chooses colour and marker, 0 is the baseline."""

    label: str
    number: int
    points: Sequence[Point]

    @property
    def style(self) -> str:
        """CSS classes of its colour and, from the second round of colours on, of its dashes."""
        if self.number == 0:
            return "c0"
        turn, colour = divmod(self.number - 1, COLOURS)
        return f"c{colour + 1}" + (" dashed" if turn else "")


def plot(
    title: str,
    description: str,
    series: Sequence[Series],
    x: Axis,
    y: Axis,
    *,
    joined: bool = True,
    dodge: bool = False,
    level: float | None = None,
    edges: Sequence[tuple[float, int]] = (),
) -> str:
    """Points with their intervals as bars.

    Args:
        joined: with lines between a series' points.
        dodge: series side by side, where x has steps.
        level: y of a line across, such as that of no difference.
        edges: x of lines from top to bottom, and the number of the series that they belong to.
    """
    body = _frame(x, y)
    for at_x, number in edges:
        style = Series("", number, ()).style
        body += f'<path class="edge {style}" d="M{_x(x, at_x):.1f} {TOP}V{BOTTOM}"/>'
    if level is not None:
        body += f'<path class="level" d="M{LEFT} {_y(y, level):.1f}H{RIGHT}"/>'
    for index, one in enumerate(series):
        shift = (index - (len(series) - 1) / 2) * DODGE if dodge else 0.0
        at = [(_x(x, point.x) + shift, _y(y, point.y)) for point in one.points]
        drawn = "".join(
            f'<path class="bar" d="M{px:.1f} {_y(y, point.low):.1f}V{_y(y, point.high):.1f}"/>'
            for (px, _), point in zip(at, one.points)
            if point.low is not None and point.high is not None and point.low < point.high
        )
        if joined and len(at) > 1:
            drawn += f'<path class="line" d="M{"L".join(f"{px:.1f} {py:.1f}" for px, py in at)}"/>'
        # Equal points would hide each other: they stand side by side, or the earlier series' markers are larger.
        radius = 4.5 if dodge else 4 + 2.2 * (len(series) - 1 - index) / max(1, len(series) - 1)
        for place, point in zip(at, one.points):
            drawn += f"<g><title>{escape(f'{one.label}: {point.text}')}</title>{marker(one.number, *place, radius)}</g>"
        body += f'<g class="{one.style}">{drawn}</g>'
    return _svg(title, description, body)


def heat_map(
    title: str, description: str, columns: Sequence[str], rows: Sequence[str], cells: Cells, number: int = 0
) -> str:
    """Cells by (row, column): their value, 0.0 - 1.0, and its text; a cell without a value is an outline.

    Args:
        number: of the series whose colour the cells have.
    """
    wide, high = (RIGHT - LEFT) / len(columns), min(30.0, (BOTTOM - TOP) / len(rows))
    body = f'<text class="name" x="{LEFT}" y="20">needle depth, %</text>'
    for index, text in enumerate(rows):
        body += f'<text class="tick end" x="{LEFT - 8}" y="{TOP + (index + 0.5) * high + 4:.1f}">{escape(text)}</text>'
    bottom = TOP + len(rows) * high
    for index, text in enumerate(columns):
        body += f'<text class="tick" x="{LEFT + (index + 0.5) * wide:.1f}" y="{bottom + 16:.1f}">{escape(text)}</text>'
    body += f'<text class="name" x="{RIGHT}" y="{bottom + 34:.1f}" text-anchor="end">tokens</text>'
    drawn = ""
    for row, column in itertools.product(range(len(rows)), range(len(columns))):
        x, y = LEFT + column * wide, TOP + row * high
        box = f'x="{x + 1:.1f}" y="{y + 1:.1f}" width="{wide - 2:.1f}" height="{high - 2:.1f}" rx="3"'
        if (row, column) not in cells:
            drawn += f'<rect class="none" {box}/>'
            continue
        value, text = cells[row, column]
        strength = 0.06 + 0.6 * value  # light enough for dark text in print and in light mode
        shade = " strong" if strength > 0.5 else ""  # where the text must change in dark mode
        drawn += (
            f'<rect class="heat" {box} fill-opacity="{strength:.2f}"/><text class="value{shade}" '
            f'x="{x + wide / 2:.1f}" y="{y + high / 2 + 4:.1f}">{escape(text)}</text>'
        )
    body += f'<g class="{Series("", number, ()).style}">{drawn}</g>'
    return _svg(title, description, body, int(bottom + 44))


def marker(number: int, x: float, y: float, radius: float = 4.5) -> str:
    """The series' marker around (x, y): the baseline's is an open circle."""
    if number == 0:
        return f'<circle class="open" cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'
    shape = SHAPES[(number - 1) % len(SHAPES)]
    return f'<path class="mark" transform="translate({x:.1f} {y:.1f}) scale({radius:.1f})" d="{shape}"/>'


def swatch(series: Series) -> str:
    """A series' line and marker, for legends and tables."""
    return (
        f'<svg class="swatch {series.style}" viewBox="0 0 26 14" aria-hidden="true" focusable="false">'
        f'<path class="line" d="M1 7H25"/>{marker(series.number, 13, 7, 4)}</svg>'
    )


def _x(axis: Axis, value: float) -> float:
    return LEFT + (RIGHT - LEFT) * axis.place(value)


def _y(axis: Axis, value: float) -> float:
    return BOTTOM - (BOTTOM - TOP) * axis.place(value)


def _frame(x: Axis, y: Axis) -> str:
    drawn = f'<text class="name" x="{LEFT}" y="20">{escape(y.name)}</text>'
    for value, text in y.ticks:
        drawn += f'<path class="grid" d="M{LEFT} {_y(y, value):.1f}H{RIGHT}"/>'
        drawn += f'<text class="tick end" x="{LEFT - 8}" y="{_y(y, value) + 4:.1f}">{escape(text)}</text>'
    for value, text in x.ticks:
        drawn += f'<text class="tick" x="{_x(x, value):.1f}" y="{BOTTOM + 18}">{escape(text)}</text>'
    return drawn + f'<text class="name" x="{RIGHT}" y="{BOTTOM + 36}" text-anchor="end">{escape(x.name)}</text>'


def _svg(title: str, description: str, body: str, height: int = HEIGHT) -> str:
    name = f"{zlib.crc32((title + description + body).encode()):08x}"
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="t{name} d{name}">'
        f'<title id="t{name}">{escape(title)}</title><desc id="d{name}">{escape(description)}</desc>{body}</svg>'
    )
