"""The two figures of a q_id and the one across q_ids, as PNG bytes. Numbers come from artifacts; nothing is computed
from a model here."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from relfv.types import ScoredHead

_WITH, _WITHOUT, _CLEAN = "#b2182b", "#4d4d4d", "#2166ac"
_LABELS = {
    "mean_delta_p": "mean change in P(answer)",
    "mean_delta_logit": "mean change in the answer's logit",
    "mean_delta_logprob": "mean change in log P(answer), nats",
}
_TITLE_WIDTH = 4.0
"""Inches that a title of usual length needs."""
_LONGEST_NAME = 16
"""Letters of a q_id that label a row or column; the JSON file has the rest."""


def heatmap_png(scored: Sequence[ScoredHead], metric: str, top: Sequence[ScoredHead], q_id: str) -> bytes:
    """``metric`` of every head, layers upward and heads to the right, the ``top`` heads framed.

    Colours are symmetric about zero. Heads that were not swept stay grey.
    """
    n_layers = 1 + max(head.id.layer for head in scored)
    n_heads = 1 + max(head.id.head for head in scored)
    grid = np.full((n_layers, n_heads), np.nan)
    for head in scored:
        grid[head.id.layer, head.id.head] = head.scores[metric]
    limit = float(np.nanmax(np.abs(grid))) or 1.0

    cell = min(0.4, max(0.13, 6.0 / max(n_heads, n_layers)))  # inches; 6 x 6 heads to 64 x 80 stay legible
    wide, high = cell * n_heads, cell * n_layers
    beside = max(0.0, _TITLE_WIDTH - wide - 1.6)  # a narrow grid stands in the middle under its title
    figure, place = _figure(wide + 1.6 + beside, high + 0.95)
    left = 0.6 + beside / 2
    axes = place(left, 0.5, wide, high)
    axes.set_facecolor("0.8")
    image = axes.imshow(grid, origin="lower", cmap="RdBu_r", norm=TwoSlopeNorm(0.0, -limit, limit), aspect="auto")
    corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
    frames = [corners + np.array((head.id.head, head.id.layer)) for head in top]
    axes.add_collection(PolyCollection(frames, facecolors="none", edgecolors="black", linewidths=1.2), autolim=False)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(_whole_numbers(wide))
    axes.yaxis.set_major_locator(_whole_numbers(high))
    n_trials = f", {scored[0].n_trials} trials" if scored[0].n_trials else ""
    figure.text(
        0.5, 1 - 0.12 / figure.get_figheight(), f"{q_id}: CIE of every head{n_trials} (top {len(top)} framed)",
        ha="center", va="top", fontsize=10, parse_math=False,
    )  # fmt: skip
    figure.colorbar(image, cax=place(left + wide + 0.12, 0.5, 0.14, high), label=_LABELS.get(metric, metric))
    return _png(figure)


def injection_curve_png(
    layers: Mapping[int, Mapping[str, Any]],
    reference: Mapping[str, Any] | None,
    q_id: str,
    shares_of_hidden: Sequence[float] = (),
) -> bytes:
    """P(first answer token) and accuracy over the injection layer, with and without the vector.

    ``layers`` maps each layer to its eval_summary; ``reference`` is that of stepE_eval.json (clean 9-shot prompts of
    the same trials), drawn as a line if there; ``shares_of_hidden``, the length of what is added by the hidden state's,
    are told in the title.
    """
    order = sorted(layers)
    figure, place = _figure(9.0, 3.4)
    panels = [place(left, 0.48, 4.0, 2.35) for left in (0.42, 4.87)]
    n_eval = layers[order[0]]["n_eval"]
    for axes, title, name, clean in (
        (panels[0], "P(first answer token)", "mean_p", "mean_p"),
        (panels[1], "first-token accuracy", "acc", "acc"),
    ):
        axes.plot(
            order,
            [layers[i][f"{name}_with"] for i in order],
            "o-",
            color=_WITH,
            ms=3.5,
            label="zero-shot + FV",
        )
        axes.plot(order, [layers[i][f"{name}_base"] for i in order], "--", color=_WITHOUT, label="zero-shot")
        if reference:
            axes.axhline(reference["clean"][clean], color=_CLEAN, ls=":", label="clean few-shot")
        axes.set_title(title, fontsize=10, y=1.0)  # without y Matplotlib measures every tick label to find one
        axes.set_xlabel("injection layer")
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_locator(_whole_numbers(4.0))
    panels[0].legend(fontsize=8, framealpha=0.9)
    low, high = (f"{100 * end(shares_of_hidden, default=0):.2g}" for end in (min, max))
    size = f"; {low} to {high} % as long as the hidden state" if shares_of_hidden else ""
    figure.suptitle(
        f"{q_id}: function vector added at each layer ({n_eval} zero-shot prompts{size})", fontsize=10, parse_math=False
    )
    return _png(figure)


def cross_png(q_ids: Sequence[str], layers: Mapping[str, int], delta_p: np.ndarray) -> bytes:
    """``delta_p`` (target, source): mean change in P of each q_id's prompts with each q_id's vector, NaN where there is
    none yet; ``layers`` has each target's layer. A row's best vector has a dot, the own one is framed.

    Colours are symmetric about zero.
    """
    n = len(q_ids)
    limit = 1.0 if np.isnan(delta_p).all() else float(np.nanmax(np.abs(delta_p))) or 1.0
    cell = min(0.7, max(0.17, 6.0 / n))  # inches; 2 to 40 q_ids stay legible
    names = [q_id if len(q_id) <= _LONGEST_NAME else f"{q_id[: _LONGEST_NAME - 1]}…" for q_id in q_ids]
    rows = [
        f"{name}, layer {layers[q_id]}" if q_id in layers else name for name, q_id in zip(names, q_ids, strict=True)
    ]
    letter = 0.08  # inches, of a tick label
    below, left = 0.55 + letter * max(map(len, names)), 0.5 + letter * max(map(len, rows))
    beside = max(0.0, _TITLE_WIDTH + 0.6 - cell * n - left - 1.0)
    figure, place = _figure(left + cell * n + beside + 1.0, below + cell * n + 0.55)
    axes = place(left, below, cell * n, cell * n)
    axes.set_facecolor("0.8")
    image = axes.imshow(delta_p, cmap="RdBu_r", norm=TwoSlopeNorm(0.0, -limit, limit), aspect="auto")
    corners = np.array([(-0.5, -0.5), (0.5, -0.5), (0.5, 0.5), (-0.5, 0.5)])
    axes.add_collection(
        PolyCollection([corners + i for i in range(n)], facecolors="none", edgecolors="black", linewidths=1.2),
        autolim=False,
    )
    known = [i for i in range(n) if not np.isnan(delta_p[i]).all()]
    axes.plot([int(np.nanargmax(delta_p[i])) for i in known], known, "o", color="black", ms=3.0, mec="white", mew=0.6)
    axes.set_xticks(range(n), names, rotation=90, fontsize=8, parse_math=False)
    axes.set_yticks(range(n), rows, fontsize=8, parse_math=False)
    axes.set_xlabel("function vector of")
    axes.set_ylabel("prompts of")
    figure.text(
        0.5, 1 - 0.12 / figure.get_figheight(), "Function vectors across q_ids (own framed, best dotted)",
        ha="center", va="top", fontsize=10, parse_math=False,
    )  # fmt: skip
    bar = place(left + cell * n + 0.12, below, 0.14, cell * n)
    figure.colorbar(image, cax=bar, label=_LABELS["mean_delta_p"] if cell * n > 2 else "change in P")
    return _png(figure)


def _figure(width: float, height: float) -> tuple[Figure, Callable[[float, float, float, float], Axes]]:
    """A figure of this many inches, and a function that places axes in it: left, bottom, width, height in inches.

    Matplotlib's layout engines find margins by drawing all text twice more, half of a figure's time.
    """
    figure = Figure(figsize=(width, height))

    def place(left: float, bottom: float, wide: float, high: float) -> Axes:
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    return figure, place


def _whole_numbers(inches: float) -> MaxNLocator:
    return MaxNLocator(nbins=max(2, min(16, int(inches * 4))), integer=True)


def _png(figure: Figure) -> bytes:
    """Drawn once: ``savefig`` draws a figure a first time only to learn its size."""
    figure.set_dpi(110)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
