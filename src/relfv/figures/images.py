"""The figures: heatmap and injection curve of a q_id, both of many q_ids side by side, and vectors across q_ids.

Numbers come from artifacts; nothing is computed from a model here. Every function gives a ``Canvas``, to be written as
PNG, SVG or PDF. Colours are blue for less and red for more, told apart by colour-blind readers, with white at zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from relfv.figures.canvas import Canvas, cut, text_width
from relfv.figures.panels import (
    TICK,
    Page,
    axes,
    bar_width,
    colour_bar,
    colours_of,
    columns_for,
    tick_below,
    tick_beside,
)
from relfv.settings import Settings
from relfv.ticks import whole_ticks
from relfv.types import ScoredHead

_WITH, _WITHOUT, _CLEAN = "#b2182b", "#4d4d4d", "#2166ac"
_LABELS = {
    "mean_delta_p": "mean change in P(answer)",
    "mean_delta_logit": "mean change in the answer's logit",
    "mean_delta_logprob": "mean change in log P(answer), nats",
}
_LARGEST, _CELL, _NARROWEST = 432.0, 29.0, 130.0
"""Points: a heatmap's longer side at most, a cell's at most, and a heatmap of few heads at least."""
_LONGEST_NAME = 150.0
"""Points of a q_id's name beside a row or below a column; the JSON file has the rest."""


@dataclass(frozen=True)
class Heatmap:
    """The scores of one q_id's heads, for a heatmap."""

    scored: Sequence[ScoredHead]
    top: Sequence[ScoredHead]
    """The heads that are framed."""
    title: str

    def grid(self, metric: str) -> np.ndarray:
        """Scores as an array (layer, head), NaN where a head was not swept."""
        n_layers, n_heads = (1 + max(getattr(head.id, of) for head in self.scored) for of in ("layer", "head"))
        grid = np.full((n_layers, n_heads), np.nan)
        for head in self.scored:
            grid[head.id.layer, head.id.head] = head.scores[metric]
        return grid


@dataclass(frozen=True)
class Curve:
    """Step6's results of one q_id, for an injection curve."""

    layers: Mapping[int, Mapping[str, Any]]
    """The eval_summary of each layer."""
    reference: Mapping[str, Any] | None
    """The eval_summary of stepE_eval.json (clean prompts with demos, of the same trials), if there."""
    title: str
    shares_of_hidden: Sequence[float] = field(default=())
    """Length of the vector that is added, as a share of the hidden state's length, at each layer where it is known."""


def caption(settings: Settings) -> str:
    """A line with the model and what else numbers depend on; empty for a model that is not known."""
    if not settings.model:
        return ""
    s = settings
    model = s.model.rstrip("/").rpartition("/")[2] if s.model.startswith(("/", ".")) else s.model
    packed = "" if s.quant == "none" else f", {s.quant}"
    return (
        f"{model}, {s.dtype}{packed}, {s.precision} arithmetic; {s.n_trials_per_q} trials, {s.n_demos} demos, "
        f"{s.corruption}, seed {s.seed}; ranked by {s.score_key}, k {s.topk}, alpha {s.alpha:g}"
    )


def heatmap(
    shown: Heatmap, metric: str, about: str = "", *, width: float | None = None, height: float | None = None
) -> Canvas:
    """Draw ``metric`` of every head, layers upward and heads to the right, the top ones framed.

    Heads that were not swept stay grey. ``width`` and ``height`` are the page's, in inches; without them cells are
    square, but for models of few heads, and no side is longer than six inches.
    """
    n_trials = f", {shown.scored[0].n_trials} trials" if shown.scored[0].n_trials else ""
    title = f"{shown.title}: CIE of every head{n_trials} (top {len(shown.top)} framed)"
    return heatmaps([shown], metric, title, about, width=width, height=height)


def heatmaps(
    shown: Sequence[Heatmap],
    metric: str,
    title: str,
    about: str = "",
    *,
    columns: int | None = None,
    width: float | None = None,
    height: float | None = None,
) -> Canvas:
    """Draw several heatmaps side by side, in one scale of colours."""
    grids = [one.grid(metric) for one in shown]
    limit = max((float(np.nanmax(np.abs(grid))) for grid in grids), default=0.0) or 1.0
    n_layers, n_heads = (max(grid.shape[axis] for grid in grids) for axis in (0, 1))
    single = len(shown) == 1
    longest = _LARGEST if single else 130.0
    cell = min(_CELL, longest / max(n_layers, n_heads))
    wide, high = max(cell * n_heads, min(_NARROWEST, 2 * cell * n_heads)), cell * n_layers
    page = Page(
        title, about, len(shown), columns or columns_for(len(shown), wide, high), wide, high, below=30.0,
        right=bar_width(limit), heads=0.0 if single else 13.0, width=width, height=height,
    )  # fmt: skip
    for one, grid, (x, y) in zip(shown, grids, page.places(), strict=True):
        if not single:
            page.canvas.words(x, y + page.high + 4, cut(one.title, TICK, page.wide + 20), TICK)
        page.canvas.cells(x, y, page.wide, page.high, colours_of(grid, limit))
        each, of_layer = page.wide / grid.shape[1], page.high / grid.shape[0]
        for head in reversed(one.top):
            place = x + head.id.head * each, y + head.id.layer * of_layer
            page.canvas.rectangle(*place, each, of_layer, width=min(1.2, 0.4 + 0.08 * min(each, of_layer)))
        axes(page.canvas, x, y, page.wide, page.high, "head", "layer")
        for i in whole_ticks(grid.shape[1], each, apart=17):
            tick_below(page.canvas, x + (i + 0.5) * each, y, str(i))
        for i in whole_ticks(grid.shape[0], of_layer, apart=11):
            tick_beside(page.canvas, x, y + (i + 0.5) * of_layer, str(i))
    colour_bar(page, limit, _LABELS.get(metric, metric))
    return page.canvas


def injection_curve(
    shown: Curve, about: str = "", *, width: float | None = None, height: float | None = None
) -> Canvas:
    """Draw P(first answer token) and accuracy over the injection layer, with and without the vector."""
    n_eval = next(iter(shown.layers.values()))["n_eval"]
    size = ""
    if shares := shown.shares_of_hidden:
        size = f"; {_percent(min(shares))} to {_percent(max(shares))} % as long as the hidden state"
    title = f"{shown.title}: function vector added at each layer ({n_eval} zero-shot prompts{size})"
    page = Page(title, about, 2, 2, 288.0, 165.0, below=44.0, heads=14.0, width=width, height=height)
    names = (("P(scored token)", "mean_p"), ("accuracy of the scored token", "acc"))
    for (words, name), place in zip(names, page.places(), strict=True):
        _curve(page, place, shown, words, name)
    _legend(page)
    return page.canvas


def _percent(share: float) -> str:
    return f"{100 * share:.2g}" if share < 1 else f"{100 * share:.0f}"


def injection_curves(
    shown: Sequence[Curve],
    name: str,
    title: str,
    about: str = "",
    *,
    columns: int | None = None,
    width: float | None = None,
    height: float | None = None,
) -> Canvas:
    """Draw several injection curves side by side: ``name`` is ``mean_p`` or ``acc``."""
    columns = columns or columns_for(len(shown), 150.0, 92.0)
    page = Page(
        title, about, len(shown), columns, 150.0, 92.0, below=44.0, heads=13.0, width=width, height=height
    )  # fmt: skip
    for one, place in zip(shown, page.places(), strict=True):
        _curve(page, place, one, one.title, name)
    _legend(page)
    return page.canvas


def cross(
    names: Sequence[str],
    layers: Sequence[int | None],
    delta_p: np.ndarray,
    about: str = "",
    title: str = "Function vectors across q_ids (own framed, best dotted)",
) -> Canvas:
    """Draw ``delta_p`` (target, source): mean change in P of each q_id's prompts with each q_id's vector, NaN where
    there is none yet; ``layers`` has each target's layer. A row's best vector has a dot, the own one is framed."""
    n = len(names)
    limit = 1.0 if np.isnan(delta_p).all() else float(np.nanmax(np.abs(delta_p))) or 1.0
    cell = min(50.0, max(12.5, _LARGEST / n))
    names = [cut(name, TICK, _LONGEST_NAME) for name in names]
    rows = [name if layer is None else f"{name}, layer {layer}" for name, layer in zip(names, layers, strict=True)]
    left, below = (max(text_width(text, TICK) for text in of) for of in (rows, names))
    page = Page(
        title, about, 1, 1, cell * n, cell * n, left=left + 26.0,
        below=below + 26.0, right=bar_width(limit),
    )  # fmt: skip
    (x, y), wide = page.places()[0], page.wide
    page.canvas.cells(x, y, wide, wide, colours_of(delta_p[::-1], limit))
    for i in range(n):
        middle = y + wide - (i + 0.5) * cell
        page.canvas.rectangle(x + i * cell, middle - cell / 2, cell, cell, width=1.2)
        if not np.isnan(delta_p[i]).all():
            best = x + (int(np.nanargmax(delta_p[i])) + 0.5) * cell
            page.canvas.dots([(best, middle)], "black", min(2.4, 0.18 * cell), edge="white")
        tick_beside(page.canvas, x, middle, rows[i])
        at = x + (i + 0.5) * cell
        page.canvas.line([(at, y), (at, y - 3)])
        page.canvas.words(at + 0.35 * TICK, y - 5, names[i], TICK, align=1.0, up=True)
    page.canvas.rectangle(x, y, wide, wide)
    page.canvas.words(x + wide / 2, y - below - 17, "function vector of", 8.5, align=0.5)
    page.canvas.words(x - left - 12, y + wide / 2, "prompts of", 8.5, align=0.5, up=True)
    colour_bar(page, limit, _LABELS["mean_delta_p"] if wide > 150 else "change in P")
    return page.canvas


# --- curves ---------------------------------------------------------------------------------------------------------

_KEY: tuple[tuple[str, dict[str, Any]], ...] = (
    ("zero-shot + FV", {"edge": _WITH, "width": 1.6}),
    ("zero-shot", {"edge": _WITHOUT, "width": 1.3, "dashes": (5.0, 3.0)}),
    ("clean, with demos", {"edge": _CLEAN, "width": 1.5, "dashes": (1.5, 2.5)}),
)


def _curve(page: Page, place: tuple[float, float], shown: Curve, title: str, name: str) -> None:
    canvas, (x, y), order = page.canvas, place, sorted(shown.layers)
    each = page.wide / (order[-1] - order[0] + 1)

    def at(layer: int, value: float) -> tuple[float, float]:
        share = (min(1.0, max(0.0, value)) + 0.03) / 1.06
        return x + (layer - order[0] + 0.5) * each, y + page.high * share

    for value in (0.0, 0.25, 0.5, 0.75, 1.0):
        level = at(0, value)[1]
        canvas.line([(x, level), (x + page.wide, level)], edge="#dddddd", width=0.6)
        tick_beside(canvas, x, level, f"{value:g}")
    with_it, without = (
        [at(i, shown.layers[i][f"{name}_{half}"]) for i in order if shown.layers[i][f"{name}_{half}"] is not None]
        for half in ("with", "base")
    )
    styles = [style for _, style in _KEY]
    canvas.line(with_it, **styles[0], exact=True)
    canvas.dots(with_it, _WITH, min(1.8, 0.3 * each))
    if len(order) == 1:  # a line through one layer has no length
        without = [(x, without[0][1]), (x + page.wide, without[0][1])]
    canvas.line(without, **styles[1], exact=True)
    if shown.reference:
        level = at(0, shown.reference["clean"][name])[1]
        canvas.line([(x, level), (x + page.wide, level)], **styles[2])
    canvas.words(x + page.wide / 2, y + page.high + 4, cut(title, 8.5, page.wide), 8.5, align=0.5)
    axes(canvas, x, y, page.wide, page.high, "injection layer")
    for i in whole_ticks(len(order), each, apart=17):
        tick_below(canvas, at(order[i], 0)[0], y, str(order[i]))


def _legend(page: Page) -> None:
    """Draw the legend in the middle of the page's foot."""
    canvas = page.canvas
    widths = [30.0 + text_width(words, 8.0) + 14.0 for words, _ in _KEY]
    x = max(4.0, (canvas.width - sum(widths)) / 2)
    for (words, style), width in zip(_KEY, widths, strict=True):
        canvas.line([(x, 9.0), (x + 24, 9.0)], **style)
        canvas.words(x + 29, 6.2, words, 8.0)
        x += width
