"""``relfv figure``: draw figures again from saved artifacts, in another size, format or metric, or of several q_ids
side by side; and draw the other formats of a q_id's own two figures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from relfv.errors import InputError
from relfv.logs import show
from relfv.relations import called, named
from relfv.runs.qid import no_model, work_on
from relfv.settings import FIGURE_FORMATS, Settings
from relfv.stages import curve, heatmap
from relfv.stages.stage import Work
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.store.files import sha256_file, write_atomic
from relfv.store.status import STATUS_FILE, QidStatus, read_status
from relfv.store.statuses import find_statuses

if TYPE_CHECKING:
    from relfv.figures.canvas import Canvas

log = logging.getLogger(__name__)

_OWN = {heatmap.HEATMAP: heatmap.drawn, curve.CURVE: curve.drawn}


@dataclass(frozen=True)
class FigureRequest:
    """One call of ``relfv figure``; None stands for what the q_ids were made with, or what fits."""

    folder: Path
    kind: str
    """Kind of figure: ``heatmap`` or ``curve``."""
    out: Path
    q_list: Sequence[str] | None = None
    metric: str | None = None
    """Metric to draw: for heatmaps one of SCORE_KEYS; for curves ``p`` or ``acc``, where several stand side by side."""
    topk: int | None = None
    columns: int | None = None
    width: float | None = None
    """Width of the page in inches."""
    height: float | None = None
    """Height of the page in inches."""
    dpi: int = 300


def has_figures(status: QidStatus, asked: Settings) -> bool:
    """Whether a complete q_id has its figures, undamaged, in the other formats that are asked for."""
    return all(
        status.other_files.get(path.relative_to(status.artifacts_dir).as_posix()) == (sha256_file(path) or "")
        for kind in asked.more_formats
        for path in _paths(status, kind)
    )


def add_figures(status: QidStatus, work: Work, asked: Settings) -> None:
    """Draw a complete q_id's two figures in the other formats that are asked for."""
    for kind in asked.more_formats:
        for (file, drawn), path in zip(_OWN.items(), _paths(status, kind), strict=True):
            status.note(write_atomic(path, drawn(work).to_bytes(kind)))
            log.debug("%s %s as %s", status.q_id, file.named(status.q_id), kind)


def _paths(status: QidStatus, kind: str) -> list[Path]:
    return [(status.artifacts_dir / file.named(status.q_id)).with_suffix(f".{kind}") for file in _OWN]


def figure(request: FigureRequest) -> int:
    """Draw the figure, and show its path. Raises InputError for q_ids that are not there or not done, and for another
    metric or format than there is."""
    kind = request.out.suffix.removeprefix(".").lower()
    if kind not in FIGURE_FORMATS:
        raise InputError(f"--out {request.out}: expected a file name that ends in .{', .'.join(FIGURE_FORMATS)}")
    _require_free(request.out)
    works = [_work_on(status, request) for status in _chosen(request)]
    canvas = _heatmaps(works, request) if request.kind == "heatmap" else _curves(works, request)
    show(write_atomic(request.out, canvas.to_bytes(kind, dpi=request.dpi)))
    return 0


def _require_free(out: Path) -> None:
    """Raise InputError for a file that is no figure, or is one of a q_id's own results."""
    if out.is_file() and not out.read_bytes().lstrip().startswith((b"\x89PNG", b"%PDF", b"<?xml", b"<svg")):
        raise InputError(f"--out {out}: is there and is no figure; it is not replaced, so choose another name")
    if any((above / STATUS_FILE).exists() for above in out.resolve().parents):
        raise InputError(f"--out {out}: lies among a q_id's results; choose another folder")


def _chosen(request: FigureRequest) -> list[QidStatus]:
    """The completed q_ids, or those of ``q_list``, in its order."""
    found = [status for path in find_statuses(request.folder) if (status := read_status(path))]
    by_name = {status.q_id: status for status in found}
    if len(by_name) < len(found):
        raise InputError(f"{request.folder}: holds several relations; expected one, so name its folder")
    wanted = [q_id for q_id, status in by_name.items() if status.status == "completed"]
    if request.q_list is not None:
        wanted = list(dict.fromkeys(request.q_list))
    elif not wanted:
        raise InputError(f"{request.folder}: no completed q_id here; expected the folder that relfv run wrote to")
    if missing := [q_id for q_id in wanted if q_id not in by_name or not by_name[q_id].has_results()]:
        there = [q_id for q_id, status in by_name.items() if status.has_results()]
        raise InputError(f"--q_list: {named(missing)} without results in {request.folder}; it has {named(there)}")
    return [by_name[q_id] for q_id in wanted]


def _work_on(status: QidStatus, request: FigureRequest) -> Work:
    """The work on a q_id, with the request's metric and k in place of its own."""
    work = work_on(status, no_model)
    metric = {"score_key": request.metric} if request.kind == "heatmap" and request.metric else {}
    work.settings = replace(work.settings, **metric, **({"topk": request.topk} if request.topk else {}))
    return work


def _heatmaps(works: Sequence[Work], request: FigureRequest) -> Canvas:
    from relfv.figures.images import heatmap as one_heatmap
    from relfv.figures.images import heatmaps

    shown, size = [heatmap.heatmap_of(work) for work in works], {"width": request.width, "height": request.height}
    metric, about = works[0].settings.score_key, _about(works)
    if len(shown) == 1:
        return one_heatmap(shown[0], metric, about, **size)
    title = f"CIE of every head, {len(shown)} relations (top {len(shown[0].top)} framed)"
    return heatmaps(shown, metric, title, about, columns=request.columns, **size)


def _curves(works: Sequence[Work], request: FigureRequest) -> Canvas:
    from relfv.figures.images import injection_curve, injection_curves

    for work in works:
        if not work.folder.has(STEP6_SUMMARY):
            raise InputError(f"{called(work.q_id, work.name)}: no injection curve yet; let 'relfv run' finish it")
    shown, size = [curve.curve_of(work.folder, work.name) for work in works], {}
    size |= {"width": request.width, "height": request.height}
    if len(shown) == 1:
        return injection_curve(shown[0], _about(works), **size)
    name, words = ("acc", "accuracy") if request.metric == "acc" else ("mean_p", "P")
    title = f"{words} of the scored token, function vector added at each layer, {len(shown)} relations"
    return injection_curves(shown, name, title, _about(works), columns=request.columns, **size)


def _about(works: Sequence[Work]) -> str:
    """Caption that the q_ids share; empty where they were made in different ways."""
    from relfv.figures.images import caption

    captions = {caption(work.settings) for work in works}
    return captions.pop() if len(captions) == 1 else ""
