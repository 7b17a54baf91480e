"""Lines, cells and words on a page of given size, as PNG, SVG or PDF bytes.

Matplotlib's renderers without its axes: an axis finds its ticks, lays them out and measures every label, which is three
quarters of what a figure costs. Lengths are points (1/72 inch) from the page's lower left corner. Bytes depend on what
is drawn alone: no dates, no random ids.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.path import Path as Outline
from matplotlib.transforms import Affine2D

SCREEN_DPI = 110.0
Points = Sequence[tuple[float, float]]
_NO_GLYPH = "�"
_RC: dict[Any, Any] = {
    "pdf.fonttype": 42,  # embedded TrueType, so that words can be edited and searched as words
    "svg.fonttype": "path",  # outlines: the same on every machine, whatever fonts it has
    "svg.hashsalt": "relfv",
    "text.hinting": "none",  # takes a fifth of the time
}


class Canvas:
    """A page and everything drawn on it, in order."""

    def __init__(self, width: float, height: float, title: str = "", about: str = "") -> None:
        """An empty page of ``width`` x ``height`` points; ``title`` and ``about`` go into the file's metadata."""
        self.width, self.height, self.title, self.about = width, height, title, about
        self._strokes: list[Callable[[Any, float], None]] = []

    def rectangle(self, x: float, y: float, wide: float, high: float, **style: Any) -> None:
        """Draw a box, with ``face`` and ``edge`` colours as they are given; see ``line`` for the rest."""
        self.line([(x, y), (x + wide, y), (x + wide, y + high), (x, y + high), (x, y)], **style)

    def line(
        self,
        points: Points,
        *,
        edge: str | None = "black",
        face: str | None = None,
        width: float = 0.8,
        dashes: Sequence[float] | None = None,
        round_ends: bool = False,
        exact: bool = False,
    ) -> None:
        """Draw a line through ``points``, filled with ``face`` if given; ``exact`` does not move it onto whole
        pixels."""
        outline = Outline(np.asarray(points, dtype=float))

        def stroke(renderer: Any, scale: float) -> None:
            pen = renderer.new_gc()
            pen.set_foreground(edge or "none")
            pen.set_linewidth(width if edge else 0.0)
            pen.set_capstyle("round" if round_ends else "butt")
            pen.set_joinstyle("round" if round_ends else "miter")
            pen.set_snap(not exact)
            if dashes:
                pen.set_dashes(0, list(dashes))
            rgb = to_rgba(face) if face else None
            renderer.draw_path(pen, outline, Affine2D().scale(scale), rgb)
            pen.restore()

        self._strokes.append(stroke)

    def dots(self, points: Points, colour: str, radius: float, edge: str | None = None) -> None:
        """Draw a disc at each of ``points``."""
        places, disc = Outline(np.asarray(points, dtype=float)), Outline.unit_circle()

        def stroke(renderer: Any, scale: float) -> None:
            pen = renderer.new_gc()
            pen.set_foreground(edge or colour)
            pen.set_linewidth(0.6 if edge else 0.0)
            size, rgb = Affine2D().scale(radius * scale), to_rgba(colour)
            renderer.draw_markers(pen, disc, size, places, Affine2D().scale(scale), rgb)
            pen.restore()

        self._strokes.append(stroke)

    def cells(self, x: float, y: float, wide: float, high: float, colours: np.ndarray) -> None:
        """Draw ``colours``, uint8 (row, column, 4), the first row at the bottom, as cells with sharp edges."""
        rows, columns = colours.shape[:2]

        def stroke(renderer: Any, scale: float) -> None:
            fine = scale * renderer.get_image_magnification()
            down, across = max(1, round(high * fine)), max(1, round(wide * fine))
            image = colours[np.arange(down) * rows // down][:, np.arange(across) * columns // across]
            pen = renderer.new_gc()
            renderer.draw_image(pen, round(x * scale), round(y * scale), np.ascontiguousarray(image))
            pen.restore()

        self._strokes.append(stroke)

    def words(
        self, x: float, y: float, text: str, size: float = 8.0, *, align: float = 0.0, up: bool = False,
        colour: str = "black",
    ) -> None:  # fmt: skip
        """Write ``text`` on a baseline through (x, y); ``align`` 0 begins there, 0.5 is centred, 1 ends there; ``up``
        turns it to read upwards."""
        font, text, before = _font(size), _drawable(text), align * text_width(text, size)

        def stroke(renderer: Any, scale: float) -> None:
            left, base = (x, y - before) if up else (x - before, y)
            left, base = left * scale, base * scale
            base = self.height * scale - base if renderer.flipy() else base
            pen = renderer.new_gc()
            pen.set_foreground(colour)
            renderer.draw_text(pen, left, base, text, font, 90.0 if up else 0.0)
            pen.restore()

        self._strokes.append(stroke)

    def stroke(self, renderer: Any) -> None:
        """Draw everything on the page with ``renderer``."""
        scale = renderer.points_to_pixels(1.0)
        for stroke in self._strokes:
            stroke(renderer, scale)

    def to_bytes(self, kind: str = "png", *, dpi: float = SCREEN_DPI) -> bytes:
        """The page as ``png``, ``svg`` or ``pdf``; ``dpi`` is that of PNGs, and of cells in the other two."""
        figure, buffer = Figure(figsize=(self.width / 72, self.height / 72), dpi=dpi), io.BytesIO()
        figure.add_artist(_OnFigure(self))
        title, about = (text.encode("ascii", "backslashreplace").decode() for text in (self.title, self.about))
        with matplotlib.rc_context(_RC):
            if kind == "png":
                facts = {"Title": title, "Description": about}
                # Pages are plain areas: files a tenth smaller are not worth twice the time.
                FigureCanvasAgg(figure).print_png(buffer, metadata=facts, pil_kwargs={"compress_level": 2})
            elif kind == "svg":
                from matplotlib.backends.backend_svg import FigureCanvasSVG

                facts = {"Title": title, "Description": about, "Date": None}
                FigureCanvasSVG(figure).print_svg(buffer, metadata=facts)
            else:
                from matplotlib.backends.backend_pdf import FigureCanvasPdf

                facts = {"Title": title, "Subject": about, "CreationDate": None}
                FigureCanvasPdf(figure).print_pdf(buffer, metadata=facts)
        return buffer.getvalue()


class _OnFigure(Artist):
    """The artist that puts a canvas into a figure of Matplotlib, as the one thing in it."""

    def __init__(self, canvas: Canvas) -> None:
        super().__init__()
        self._canvas = canvas

    def draw(self, renderer: Any) -> None:
        """Draw the canvas; called by Matplotlib."""
        self._canvas.stroke(renderer)


@cache
def _font(size: float) -> FontProperties:
    return FontProperties(family="DejaVu Sans", size=size)


@cache
def _glyphs() -> Mapping[int, int]:
    return get_font(findfont(_font(10.0))).get_charmap()


@lru_cache(maxsize=4096)
def _drawable(text: str) -> str:
    """``text`` with a mark in place of each character that Matplotlib's own font lacks, or would take for the end of a
    line."""
    return "".join(char if ord(char) in _glyphs() and char.isprintable() else _NO_GLYPH for char in text)


@cache
def _advance(char: str) -> float:
    """Width of one letter, as a share of the size of type."""
    font = get_font(findfont(_font(10.0)))
    font.set_size(10.0, 72)
    return font.load_char(ord(char)).linearHoriAdvance / 65536 / 10.0


@lru_cache(maxsize=4096)
def text_width(text: str, size: float) -> float:
    """Width of ``text`` in points, without kerning: to let Matplotlib lay a text out only to learn its width costs as
    much as drawing it."""
    return size * sum(map(_advance, _drawable(text)))


def wrapped(text: str, size: float, width: float) -> list[str]:
    """Break ``text`` into lines of at most ``width`` points; a longer word is cut."""
    lines = [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if text_width(joined, size) <= width or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(word)
    return [cut(line, size, width) for line in lines]


def cut(text: str, size: float, width: float) -> str:
    """``text``, without its end where it is wider than ``width`` points."""
    while len(text) > 1 and text_width(text, size) > width:
        text = f"{text[: max(0, len(text) - 2)]}…"
    return text
