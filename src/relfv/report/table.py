"""``relfv status``: where every q_id stands, as a text table or as JSON."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from itertools import groupby
from pathlib import Path
from typing import Any

from relfv.errors import InputError, in_words
from relfv.logs import printable
from relfv.progress import duration
from relfv.report.registered import PLAN
from relfv.report.registered_section import plan_line
from relfv.stages.ability import in_short
from relfv.stages.caveats import tells_apart
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.stages.summary import SUMMARY
from relfv.stages.table import steps
from relfv.store.folder import QidFolder
from relfv.store.index import Index, state_of
from relfv.store.locks import held_by
from relfv.store.status import STATUS_FILE, QidStatus, now, read_status
from relfv.store.statuses import find_statuses, statuses_in

_HEADER = ("q_id", "status", "rows", "best layer", "score", "accuracy", "age")
_WHOLE = "* whole answers right: the scored tokens of these q_ids do not tell their answers apart"
_GONE = "its process is gone; the same command goes on from here"
_NARROWEST, _INDENT = 40, "    "


def status_json(root: Path) -> str:
    """Statuses as a JSON list with an object for every q_id. Raises InputError if there is nothing below ``root``."""
    return json.dumps(_rows(root), indent=2, ensure_ascii=False)


def status_table(root: Path) -> str:
    """Statuses as a text table: one row for each q_id under its relation and model, no line wider than the terminal.
    Reasons stand below, wrapped, and so do names where some name has no room beside its q_id. Raises InputError if
    there is nothing below ``root``."""
    width = max(_NARROWEST, shutil.get_terminal_size().columns)
    rows = _rows(root)
    alone = [_cells(row) for row in rows]
    named = [_with_name(cells, row) for cells, row in zip(alone, rows, strict=True)]
    widths = _widths(named)
    beside = sum(widths) + 2 * len(widths[1:]) <= width
    cells = named if beside else alone
    widths = _widths(cells)
    widths[0] = max(6, min(widths[0], width - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = [_line(_HEADER, widths)]
    shown = zip(rows, cells, strict=True)
    for (relation, model), group in groupby(shown, key=lambda one: (one[0]["relation"], one[0]["model"])):
        lines += _wrapped(f"{relation}: {model or 'model not known'}", width, "")
        for row, its in group:
            below = [] if beside else _wrapped(row["name"], width, _INDENT)
            why = _wrapped(row["reason"] or row["cannot_do"] or "", width, _INDENT)
            lines += [_line(its, widths), *below, *why]
    if any(row["whole_answers"] for row in rows if row["tells_answers_apart"] is False):
        lines += _wrapped(_WHOLE, width, "")
    for folder in dict.fromkeys(found.absolute().parent.parent for found in find_statuses(root)):
        lines += _wrapped(_of_plan(folder), width, "")
    states = [row["status"] for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    left = [row["seconds_left"] for row in rows if row["seconds_left"] is not None]
    return "\n".join([*lines, "", counts + (f"; about {duration(sum(left))} left" if left else "")])


def _of_plan(folder: Path) -> str:
    """Line about the plan that was registered in a relation's folder; empty if none was."""
    return plan_line(folder, statuses_in(folder)) if (folder / PLAN).exists() else ""


def _widths(rows: Iterable[tuple[str, ...]]) -> list[int]:
    cells = [_HEADER, *rows]
    return [max(len(row[i]) for row in cells) for i in range(len(_HEADER))]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    fitted = (_cut(cell, width).ljust(width) for cell, width in zip(cells, widths, strict=True))
    return "  ".join(fitted).rstrip()


def _cut(text: str, width: int) -> str:
    """``text`` without its middle where it is longer than ``width``: both ends of a path or a name tell it from
    others."""
    if len(text) <= width:
        return text
    end = (width - 1) // 2
    return f"{text[: width - 1 - end]}…{text[len(text) - end :]}"


def _wrapped(text: str, width: int, indent: str) -> list[str]:
    if not text:
        return []
    room = width - len(indent)
    words = " ".join(_cut(word, room) for word in printable(text).split())
    return textwrap.wrap(
        words, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    accuracy, mark = row["accuracy"], ""
    if row["tells_answers_apart"] is False:
        accuracy, mark = row["whole_answers"], "*"
    best = row["best_layer"] is not None
    return tuple(
        map(
            printable,
            (
                row["q_id"],
                row["status"],
                "" if row["rows"] is None else str(row["rows"]),
                f"{row['best_layer']} of {row['n_layers']}" if best else "",
                f"{row['best_score']:+.3f}" if best else "",
                f"{accuracy['base']:.2f} -> {accuracy['with']:.2f}{mark}" if accuracy else "",
                _age(row["updated_at"]),
            ),
        )
    )


def _with_name(cells: tuple[str, ...], row: dict[str, Any]) -> tuple[str, ...]:
    q_id, *rest = cells
    return (f"{q_id} {printable(row['name'])}".rstrip(), *rest)


def _age(updated_at: str | None) -> str:
    """Time since a status was last written: ``5 min``, ``3 h``, ``2 d``."""
    try:
        seconds = (datetime.now(timezone.utc) - datetime.fromisoformat(updated_at or "")).total_seconds()
    except (ValueError, TypeError):
        return ""
    minutes = max(0, int(seconds // 60))
    if minutes < 100:
        return f"{minutes} min" if minutes else "< 1 min"
    return f"{minutes // 60} h" if minutes < 60 * 48 else f"{minutes // (60 * 24)} d"


# --- what is known of each q_id --------------------------------------------------------------------------------------


def _rows(root: Path) -> list[dict[str, Any]]:
    folders = find_statuses(root)
    if not folders:
        raise InputError(f"{root}: no {STATUS_FILE} here or below; expected the folder that relfv run wrote to")
    rows = []
    for relation, of_relation in groupby(folders, key=lambda folder: folder.absolute().parents[1]):
        index = Index(relation, "status")
        rows += [_row_by(index, folder) for folder in of_relation]
        index.write()
    for _, group in groupby(rows, key=lambda row: (row["relation"], row["model"])):
        _add_time_left(list(group))
    return rows


def _add_time_left(rows: Sequence[dict[str, Any]]) -> None:
    """Estimate the time left of the q_ids of one relation and model, while a run goes on, from the time that its
    completed q_ids took."""
    took = [row["seconds"] for row in rows if row["status"] == "completed" and row["seconds"]]
    if took and any(row["status"] == "running" and row["reason"] != _GONE for row in rows):
        for row in rows:
            if row["status"] in ("running", "pending"):
                row["seconds_left"] = round(max(0.0, sum(took) / len(took) - (row["seconds"] or 0.0)), 1)


def _row_by(index: Index, folder: Path) -> dict[str, Any]:
    """The row of one q_id, from the index where the files that it is made from have not changed; see ``_row``."""
    q_id = folder.absolute().parent
    names = (STATUS_FILE, *(file.named(q_id.name) for file in (STEP6_SUMMARY, SUMMARY)))

    def lasts(row: dict[str, Any]) -> bool:  # the state of a running q_id is told by its lock
        return row["status"] not in ("running", "unreadable") and row["q_id"] == q_id.name

    state = state_of(f"{folder}/{name}" for name in names)
    row = index.of(q_id.name, state, lambda: _row(folder), lasts)
    return {**row, "relation": q_id.parent.name}


def _row(folder: Path) -> dict[str, Any]:
    q_id = folder.absolute().parent
    row: dict[str, Any] = {
        "relation": q_id.parent.name, "q_id": q_id.name, "name": "", "model": None,
        "status": "unreadable", "rows": None, "stage": None, "n_steps_done": None, "n_steps": None, "best_layer": None,
        "n_layers": None, "best_score": None, "accuracy": None, "whole_answers": None, "tells_answers_apart": None,
        "cannot_do": None, "updated_at": None, "seconds": None, "seconds_left": None, "reason": "",
    }  # fmt: skip
    try:
        status = read_status(folder)
        assert status is not None
        best, seconds = _best(status), _seconds(status)
    except Exception as problem:  # whatever is wrong in one folder, the others get their row
        return {**row, "reason": in_words(problem)}
    row |= {
        "q_id": status.q_id, "name": status.name, "model": status.settings.model, "status": status.status,
        "rows": status.q_row_count, "updated_at": status.updated_at, "seconds": seconds,
        "reason": status.reason or "", **best,
    }  # fmt: skip
    return row | _going_on(status) if status.status == "running" else row


def _seconds(status: QidStatus) -> float:
    """Seconds that its stages took, or have taken so far."""
    at = datetime.fromisoformat
    took = [at(record.finished_at or now()) - at(record.started_at) for record in status.stages.values()]
    return round(sum(one.total_seconds() for one in took), 1)


def _going_on(status: QidStatus) -> dict[str, Any]:
    """Progress of a running q_id: the stage that it is at."""
    here = [name for name, record in status.stages.items() if record.status != "completed"]
    stage, n_done = (here or [*status.stages] or [None])[-1], len(status.stages) - len(here)
    # The number of steps depends on the number of layers, which is known once the model has been opened.
    wanted = steps(status.expected_layers, extras=status.settings.has_extras)
    n_steps = len(wanted) if status.expected_layers else None
    reason = f"at {stage or 'its start'}, {n_done} of {n_steps or '?'} steps done"
    if held_by(QidFolder(status.artifacts_dir, status.q_id).lock) is None:
        reason = _GONE
    return {"stage": stage, "n_steps_done": n_done, "n_steps": n_steps, "reason": reason}


def _best(status: QidStatus) -> dict[str, Any]:
    """Best layer and results of a completed q_id; empty for others."""
    if status.status != "completed":
        return {}
    qid = QidFolder(status.artifacts_dir, status.q_id)
    found = STEP6_SUMMARY.read(qid.path(STEP6_SUMMARY))  # read once, so no cache is needed
    layer = found["per_layer"][str(found["best_layer"])]
    numbers = {
        "best_layer": found["best_layer"],
        "n_layers": len(found["expected_layers"]),
        "best_score": found["best_score"],
        "accuracy": {"base": layer["acc_base"], "with": layer["acc_with"]},
    }
    summary = SUMMARY.read(qid.path(SUMMARY)) if qid.has(SUMMARY) else {}
    if "scored_token" in summary:  # missing in folders of earlier versions
        numbers |= {"whole_answers": dict(summary["whole_answers"]), "tells_answers_apart": tells_apart(summary)}
    if "ability" in summary:
        said = in_short(summary["ability"])
        numbers["cannot_do"] = f"the model {said} it: {summary['ability']['why_not']}" if said else ""
    return numbers
