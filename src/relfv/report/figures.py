"""The two figures of a q_id, as PNG bytes. Numbers come from artifacts; nothing is computed from a model here."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from relfv.types import ScoredHead

_WITH, _WITHOUT, _CLEAN = "#b2182b", "#4d4d4d", "#2166ac"
_LABELS = {
    "mean_delta_p": "mean change in P(answer)",
    "mean_delta_logit": "mean change in the answer's logit",
    "mean_delta_logprob": "mean change in log P(answer), nats",
}


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

    cell = min(0.34, max(0.13, 6.0 / max(n_heads, n_layers)))  # inches; 6 x 6 heads to 64 x 80 stay legible
    size = (max(4.0, cell * n_heads + 1.7), max(2.8, cell * n_layers + 1.0))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("0.8")
    image = axes.imshow(grid, origin="lower", cmap="RdBu_r", norm=TwoSlopeNorm(0.0, -limit, limit), aspect="equal")
    for head in top:
        corner = (head.id.head - 0.5, head.id.layer - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor="black", linewidth=1.2))
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    _whole_numbers(axes)
    n_trials = f", {scored[0].n_trials} trials" if scored[0].n_trials else ""
    axes.set_title(f"{q_id}: CIE of every head{n_trials} (top {len(top)} framed)", fontsize=10)
    figure.colorbar(image, ax=axes, label=_LABELS.get(metric, metric), shrink=0.95)
    return _png(figure)


def injection_curve_png(
    layers: Mapping[int, Mapping[str, Any]], reference: Mapping[str, Any] | None, q_id: str
) -> bytes:
    """P(first answer token) and accuracy over the injection layer, with and without the vector.

    ``layers`` maps each layer to its eval_summary; ``reference`` is that of stepE_eval.json (clean 9-shot prompts of
    the same trials), drawn as a line if there.
    """
    order = sorted(layers)
    figure = Figure(figsize=(9.0, 3.4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
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
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("injection layer")
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.25)
        _whole_numbers(axes, x_only=True)
    panels[0].legend(fontsize=8, framealpha=0.9)
    figure.suptitle(f"{q_id}: function vector added at each layer ({n_eval} zero-shot prompts)", fontsize=10)
    return _png(figure)


def _whole_numbers(axes: Axes, *, x_only: bool = False) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))
    if not x_only:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=16, integer=True))


def _png(figure: Figure) -> bytes:
    FigureCanvasAgg(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()
