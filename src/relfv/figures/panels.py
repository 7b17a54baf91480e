"""The parts that figures are put together from: a page with a title and panels in rows and columns, axes, a scale of
colours.

Lengths are points, as on a ``Canvas``.
"""

from __future__ import annotations

import math
from functools import cache

import numpy as np
from matplotlib import colormaps

from relfv.figures.canvas import Canvas, cut, text_width, wrapped
from relfv.ticks import even_ticks

TITLE, SMALL, TICK = 10.0, 7.0, 7.5
"""Sizes of type, in points."""
_GREY = "#5c5c5c"
_NOT_THERE = (204, 204, 204, 255)


class Page:
    """A page of panels of one size, each with room for its ticks, below a title, and beside them what they share."""

    def __init__(
        self, title: str, about: str, n: int, columns: int, wide: float, high: float, *, left: float = 34.0,
        below: float, right: float = 8.0, heads: float = 0.0, width: float | None = None, height: float | None = None,
    ) -> None:  # fmt: skip
        """``wide`` x ``high`` is a panel's inside, which a page of given ``width`` and ``height`` (inches) changes;
        ``heads`` the room for a title over each."""
        self._n, self._columns, self._rows = n, min(columns, n), math.ceil(n / min(columns, n))
        self._left, self._below, self._gap, self._heads = left, below, 12.0, heads
        if width:
            wide = max(24.0, (72 * width - right - self._columns * (left + self._gap) + self._gap) / self._columns)
        whole = self._columns * (left + wide + self._gap) - self._gap + right
        self.aside = max(0.0, (0.0 if width else 300.0) - whole) / 2  # a narrow grid stands in the middle
        whole += 2 * self.aside
        lines = wrapped(title, TITLE, whole - 16)
        small = wrapped(about, SMALL, whole - 16) if about else []
        top = 8.0 + 13.0 * len(lines) + 9.5 * len(small)
        if height:
            high = max(24.0, (72 * height - top - self._rows * (below + heads)) / self._rows)
        self.wide, self.high = wide, high
        self._height = top + self._rows * (below + high + heads)
        self._top = top
        self.canvas = Canvas(whole, self._height, title, about)
        for i, line in enumerate(lines):
            self.canvas.words(whole / 2, self._height - 13.0 * (i + 1), line, TITLE, align=0.5)
        for i, line in enumerate(small):
            y = self._height - 13.0 * len(lines) - 9.5 * (i + 1)
            self.canvas.words(whole / 2, y, line, SMALL, align=0.5, colour=_GREY)

    def places(self) -> list[tuple[float, float]]:
        """The lower left corner of each panel's inside, row by row from the top."""
        each = self._below + self.high + self._heads
        return [
            (
                self.aside + self._left + (i % self._columns) * (self._left + self.wide + self._gap),
                self._height - self._top - (i // self._columns + 1) * each + self._below,
            )
            for i in range(self._n)
        ]


def columns_for(n: int, wide: float, high: float) -> int:
    """Number of columns that makes the page about as wide as high."""
    return max(1, min(n, round(math.sqrt(n * (high + 45) / (wide + 45)) + 0.2)))


def axes(canvas: Canvas, x: float, y: float, wide: float, high: float, across: str, upward: str = "") -> None:
    canvas.rectangle(x, y, wide, high)
    canvas.words(x + wide / 2, y - 22, across, 8.5, align=0.5)
    if upward:
        canvas.words(x - 22, y + high / 2, upward, 8.5, align=0.5, up=True)


def tick_below(canvas: Canvas, x: float, y: float, label: str) -> None:
    canvas.line([(x, y), (x, y - 3)])
    canvas.words(x, y - 11, label, TICK, align=0.5)


def tick_beside(canvas: Canvas, x: float, y: float, label: str) -> None:
    canvas.line([(x, y), (x - 3, y)])
    canvas.words(x - 5, y - 0.36 * TICK, label, TICK, align=1.0)


@cache
def _palette() -> np.ndarray:
    """The palette, uint8 (256, 4), from blue by white to red."""
    return (255 * colormaps["RdBu_r"](np.arange(256))).round().astype(np.uint8)


def colours_of(grid: np.ndarray, limit: float) -> np.ndarray:
    """Colours of the cells, uint8 (row, column, 4); zero is in the middle of the palette, NaN grey."""
    known = ~np.isnan(grid)
    colours = np.empty((*grid.shape, 4), np.uint8)
    colours[known] = _palette()[np.round((grid[known] / limit + 1) * 127.5).astype(int)]
    colours[~known] = _NOT_THERE
    return colours


def bar_width(limit: float) -> float:
    """Width in points of the scale of colours, with its numbers."""
    return 12.0 + 10.0 + 6.0 + max(text_width(f"{value:+g}", TICK) for value in even_ticks(limit)) + 20.0


def colour_bar(page: Page, limit: float, label: str) -> None:
    """Draw the scale of colours beside the panels, from the top of the first row: as high as one panel, or 150 points
    where there are more rows."""
    canvas, places, width = page.canvas, page.places(), bar_width(limit)
    top = places[0][1] + page.high
    high = min(top - places[-1][1], max(page.high, 150.0))
    x, y = canvas.width - page.aside - width + 12.0, top - high
    canvas.cells(x, y, 10.0, high, _palette()[:, None])
    canvas.rectangle(x, y, 10.0, high)
    ticks = even_ticks(limit)
    if high < 1.3 * TICK * (len(ticks) - 1) * limit / ticks[-1]:  # a map of one or two layers has no room for all
        ticks = [ticks[0], 0.0, ticks[-1]]
    for value in ticks:
        at = y + high * (value / limit + 1) / 2
        canvas.line([(x + 10, at), (x + 13, at)])
        canvas.words(x + 15, at - 0.36 * TICK, f"{value:+g}" if value else "0", TICK)
    label = cut(label, 8.0, max(60.0, high + 20))
    canvas.words(x + width - 19, y + high / 2, label, 8.0, align=0.5, up=True)
