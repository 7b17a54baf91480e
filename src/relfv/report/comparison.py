"""compare.html and compare.svg: the findings of ``relfv compare``, as one page in one file and as a figure of its
own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from relfv import __version__
from relfv.report.sections import environment
from relfv.stages.comparison import MEANING

_PANELS = (("p", "P with the vector"), ("held_out_share", "held-out share of the gap"))
_ROW, _WIDE, _LEFT, _TOP, _BELOW, _BETWEEN = 22, 280, 130, 26, 34, 24
"""Sizes in pixels: of a row, a panel's width, the labels, and the space around."""


def comparison_page(sides: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the page. ``sides`` are the results that are compared, ``rows`` those of compare.csv."""
    first, differing = sides[0]["settings"], []
    for name in first:
        values = [side["settings"][name] for side in sides]
        if len(set(values)) > 1:
            differing.append((name, values))
    return (
        environment()
        .get_template("compare.html.j2")
        .render(
            title="comparison",
            version=__version__,
            sides=sides,
            differing=differing,
            rows=rows,
            meaning=MEANING,
            figure=Markup(comparison_svg(rows, standalone=False)),
        )
    )


def comparison_svg(rows: Sequence[Mapping[str, Any]], *, standalone: bool) -> str:
    """Draw the differences and their intervals, one line each; ``standalone`` brings its own colours."""
    n = len(rows)
    panels = [_panel(i, measure, title, rows) for i, (measure, title) in enumerate(_PANELS)]
    return (
        environment()
        .get_template("compare.svg.j2")
        .render(
            standalone=standalone,
            labels=[(_TOP + (i + 0.5) * _ROW, _label(row), row["q_id"] == "all") for i, row in enumerate(rows)],
            panels=panels,
            left=_LEFT,
            top=_TOP,
            down=n * _ROW,
            across=_WIDE,
            width=_LEFT + len(_PANELS) * (_WIDE + _BETWEEN),
            height=_TOP + n * _ROW + _BELOW,
        )
    )


def _panel(i: int, measure: str, title: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One panel of differences from -1 to 1, in pixels of the whole figure."""
    start = _LEFT + i * (_WIDE + _BETWEEN)

    def x(value: float) -> float:
        return round(start + _WIDE * (min(1.0, max(-1.0, value)) + 1) / 2, 1)

    marks = []
    for number, row in enumerate(rows):
        value, low, high = (row[f"{measure}_{part}"] for part in ("difference", "low", "high"))
        if value is None:
            continue
        ends = (x(-1 if low is None else low), x(1 if high is None else high))
        said = f"{_label(row)}: {value:+.3f}" + ("" if low is None else f" ({low:+.3f} to {high:+.3f})")
        marks.append({"y": _TOP + (number + 0.5) * _ROW, "x": x(value), "low": ends[0], "high": ends[1], "said": said})
    ticks = [(x(value), f"{value:+g}" if value else "0") for value in (-1, -0.5, 0, 0.5, 1)]
    return {"title": title, "start": start, "middle": x(0), "ticks": ticks, "marks": marks}


def _label(row: Mapping[str, Any]) -> str:
    place = f"{row['relation']}/{row['q_id']}" if row["relation"] else row["q_id"]
    return f"{row['b']} - {row['a']}  {place if len(place) <= 14 else place[:6] + '…' + place[-7:]}"
