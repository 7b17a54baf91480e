"""The two figures of a q_id as plain numbers, which the templates write as inline SVG.

All text is in pixels of its own and never scaled with the drawing, so that it stays legible on a narrow screen, where
a wide figure scrolls instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from relfv.ticks import whole_ticks
from relfv.types import ScoredHead

_LEFT, _TOP, _BELOW = 34, 6, 38
"""Pixels around a drawing: tick labels and names of axes."""
_WIDE, _HIGH = 280, 180
"""Pixels of a curve's panel, width and height: with its margins it fits a telephone."""
_CONTROLS = {
    "held_out": "held out",
    "random_heads_scaled": "random heads, same length",
    "random_direction": "random directions",
}
"""The controls of controls.json that are drawn beside the function vector, with their labels."""


def heatmap(scored: Sequence[ScoredHead], metric: str, top: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Coordinates of a heatmap: ``metric`` of every head, layers upward and heads to the right, with frames for the
    ``top`` heads of top_heads.json: firm for those that are distinguishable from noise, thin for the rest.

    A cell's colour says the sign, its strength (0 to 1) the size as a share of the largest, so that zero is the page's
    own background in any theme. Coordinates of cells are whole cells; of frames, pixels.
    """
    n_layers = 1 + max(head.id.layer for head in scored)
    n_heads = 1 + max(head.id.head for head in scored)
    limit = max(abs(head.scores[metric]) for head in scored) or 1.0
    cell = min(26, max(10, 310 // n_heads))
    high = n_layers * cell
    return {
        "metric": metric,
        "limit": limit,
        "cell": cell,
        "left": _LEFT,
        "top": _TOP,
        "across": n_heads * cell,
        "down": high,
        "width": _LEFT + n_heads * cell + 4,
        "height": _TOP + high + _BELOW,
        "cells": [_cell(head, head.scores[metric], n_layers, limit) for head in scored],
        "frames": [
            {
                "x": head["head"] * cell,
                "y": (n_layers - 1 - head["layer"]) * cell,
                "kind": "firm" if head.get("distinguishable") else "thin",
            }
            for head in reversed(top)  # the best heads' frames lie above their neighbours'
        ],
        "x_ticks": [((i + 0.5) * cell, i) for i in whole_ticks(n_heads, cell, apart=24)],
        "y_ticks": [((n_layers - i - 0.5) * cell, i) for i in whole_ticks(n_layers, cell, apart=18)],
    }


def _cell(head: ScoredHead, value: float, n_layers: int, limit: float) -> tuple[int, int, str, str, str]:
    """A cell as (x, y, class, strength, text shown on hover). Short: a deep model has thousands."""
    strength = f"{abs(value) / limit:.2f}".lstrip("0").rstrip("0").rstrip(".") or "0"
    said = f"L{head.id.layer} H{head.id.head} {value:+.3g}"
    return head.id.head, n_layers - 1 - head.id.layer, "u" if value >= 0 else "d", strength, said


def curve(
    layers: Mapping[int, Mapping[str, Any]],
    reference: Mapping[str, Any] | None,
    controls: Mapping[str, Any] | None,
    best_layer: int,
) -> dict[str, Any]:
    """Coordinates of the injection curve: P and accuracy over the injection layer. ``layers`` maps each layer to its
    eval_summary; ``reference`` is the one of stepE_eval.json and ``controls`` is controls.json, where those are there:
    they give clean prompts, the 95 % band and the controls."""
    order = sorted(layers)
    first = layers[order[0]]

    def x(layer: int) -> float:
        return round(_WIDE * (layer - order[0] + 0.5) / (order[-1] - order[0] + 1), 1)

    def panel(title: str, name: str, of_control: str) -> dict[str, Any]:
        level = {"zero": first[f"{name}_base"], "clean": reference and reference["clean"][name]}
        lines = [("fv", [(x(layer), layers[layer][f"{name}_with"]) for layer in order])]
        for control in _CONTROLS if controls else ():
            rows = {layer: controls["per_layer"].get(str(layer), {}).get(control) for layer in order}  # type: ignore[index]
            # Most controls are made at some layers only: the line goes on to the next of them.
            lines.append((control, [(x(layer), row[of_control]) for layer, row in rows.items() if row]))
        return {
            "title": title,
            "levels": [(kind, _y(value)) for kind, value in level.items() if value is not None],
            "lines": [(kind, run) for kind, points in lines for run in _unbroken(points)],
            "dots": [(px, _y(value)) for px, value in lines[0][1]],
            "band": _band(controls, order, x) if controls and name == "mean_p" else "",
        }

    drawn = {control for control in _CONTROLS if controls and control in controls["meaning"]}
    return {
        "left": _LEFT,
        "top": _TOP,
        "across": _WIDE,
        "down": _HIGH,
        "width": _LEFT + _WIDE + 4,
        "height": _TOP + _HIGH + _BELOW,
        "best": x(best_layer),
        "x_ticks": [(x(order[i]), order[i]) for i in whole_ticks(len(order), _WIDE / len(order), apart=24)],
        "y_ticks": [(_y(value), f"{value:g}") for value in (0, 0.25, 0.5, 0.75, 1)],
        "panels": [panel("P of the scored token", "mean_p", "mean_p"), panel("accuracy of that token", "acc", "acc")],
        "legend": [
            ("fv", "zero-shot + FV" + (", 95% band" if controls else "")),
            *((kind, words) for kind, words in _CONTROLS.items() if kind in drawn),
            ("zero", "zero-shot"),
            *([("clean", "clean, with demos")] if reference else []),
        ],
    }


def _y(value: float) -> float:
    return round(_HIGH * (1 - min(1.0, max(0.0, value))), 1)


def _unbroken(points: Sequence[tuple[float, float | None]]) -> list[str]:
    """SVG points of each stretch without gaps: a vector that overflows has no P at its layer."""
    runs: list[list[str]] = [[]]
    for x, value in points:
        if value is None:
            runs.append([])
        else:
            runs[-1].append(f"{x},{_y(value)}")
    return [" ".join(run) for run in runs if run]


def _band(controls: Mapping[str, Any], order: Sequence[int], x: Any) -> str:
    """Outline of the interval of the change in P, drawn around zero-shot's P; empty where one end is not known."""
    zero = controls["zero_shot"]["mean_p"]
    rows = {layer: controls["per_layer"].get(str(layer), {}).get("fv", {}) for layer in order}
    if any(row.get("ci_low") is None or row.get("ci_high") is None for row in rows.values()):
        return ""
    upper = [f"{x(layer)},{_y(zero + row['ci_high'])}" for layer, row in rows.items()]
    lower = [f"{x(layer)},{_y(zero + row['ci_low'])}" for layer, row in rows.items()]
    return " ".join([*upper, *reversed(lower)])
