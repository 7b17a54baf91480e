"""The flags of ``relfv figure``."""

from __future__ import annotations

import argparse
from pathlib import Path

from relfv.commands.flags import path_flag, q_ids_from, whole_number
from relfv.errors import InputError
from relfv.settings import DEFAULT_OUT_ROOT, MOST, SCORE_KEYS, SPEC_CSV

FIGURE_HELP = "Draw heatmaps or injection curves again: another size, format or metric, or several q_ids side by side."
_CURVE_METRICS = ("p", "acc")
_LARGEST_IN = 100.0


def figure_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``relfv figure`` to ``parser``."""
    folder = DEFAULT_OUT_ROOT / SPEC_CSV.stem
    parser.add_argument("folder", type=path_flag, nargs="?", default=folder, help="of a relation, or of one q_id")
    parser.add_argument(
        "--out", type=path_flag, required=True, help="the file; its ending, png, svg or pdf, is its format"
    )
    parser.add_argument("--kind", choices=("heatmap", "curve"), default="heatmap", help="what is drawn")
    parser.add_argument(
        "--q_list",
        default="all",
        help="q_ids, separated by commas, or all that are completed: several stand side by side",
    )
    parser.add_argument(
        "--metric",
        choices=(*SCORE_KEYS, *_CURVE_METRICS),
        default=None,
        help="of heatmaps the score (default: what the q_ids' heads are ranked by); of several curves p or acc",
    )
    parser.add_argument("--topk", type=whole_number(1, MOST), default=None, help="heads to frame (default: the q_ids')")
    parser.add_argument("--columns", type=whole_number(1, MOST), default=None, help="figures beside one another")
    parser.add_argument("--width", type=_inches, default=None, help="of the page, in inches (default: what fits)")
    parser.add_argument("--height", type=_inches, default=None, help="likewise")
    parser.add_argument("--dpi", type=whole_number(30, 2400), default=300, help="pixels an inch")


def figure(args: argparse.Namespace) -> int:
    """Run ``relfv figure``."""
    from relfv.runs.figure import FigureRequest
    from relfv.runs.figure import figure as draw
    from relfv.runs.naming import take_names_below

    fits = SCORE_KEYS if args.kind == "heatmap" else _CURVE_METRICS
    if args.metric and args.metric not in fits:
        raise InputError(f"--metric {args.metric}: is not of a {args.kind}; expected one of {', '.join(fits)}")
    take_names_below(args.folder)
    options = ("metric", "topk", "columns", "width", "height", "dpi")
    request = FigureRequest(
        Path(args.folder),
        args.kind,
        args.out,
        q_ids_from(args.q_list),
        **{name: getattr(args, name) for name in options},
    )
    return draw(request)


def _inches(text: str) -> float:
    try:
        inches = float(text)
    except ValueError:
        inches = 0.0
    if not 1.0 <= inches <= _LARGEST_IN:
        raise argparse.ArgumentTypeError(f"invalid value: {text[:40]!r}; expected inches from 1 to {_LARGEST_IN:g}")
    return inches
