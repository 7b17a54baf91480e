"""Figure of which relations are alike: one matrix for each measure, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from relfv.figures.canvas import Canvas, cut, text_width
from relfv.figures.panels import TICK, Page, bar_width, colour_bar, colours_of, tick_beside

_LARGEST, _CELL = 190.0, 26.0
"""Points: a matrix's side and a cell's at most."""
_LONGEST_NAME = 110.0


def similarity(names: Sequence[str], matrices: Mapping[str, np.ndarray], about: str = "") -> Canvas:
    """Draw every matrix (relation, relation) of numbers from -1 to 1, NaN where none is known, in one scale of
    colours."""
    n = len(names)
    cell = min(_CELL, _LARGEST / n)
    every = max(1, round(1.25 * TICK / cell + 0.49))  # leave out names that would overlap
    names = [cut(name, TICK, _LONGEST_NAME) for name in names]
    longest = max(text_width(name, TICK) for name in names)
    page = Page(
        "How alike relations are, measure by measure", about, len(matrices), 2, cell * n, cell * n, left=longest + 16.0,
        below=longest + 16.0, right=bar_width(1.0), heads=14.0,
    )  # fmt: skip
    canvas, wide = page.canvas, page.wide
    for (title, matrix), (x, y) in zip(matrices.items(), page.places(), strict=True):
        canvas.words(x, y + wide + 4, title, 8.5)
        canvas.cells(x, y, wide, wide, colours_of(matrix[::-1], 1.0))
        canvas.rectangle(x, y, wide, wide)
        for i in range(0, n, every):
            tick_beside(canvas, x, y + wide - (i + 0.5) * cell, names[i])
            at = x + (i + 0.5) * cell
            canvas.line([(at, y), (at, y - 3)])
            canvas.words(at + 0.35 * TICK, y - 5, names[i], TICK, align=1.0, up=True)
    colour_bar(page, 1.0, "similarity")
    return canvas
