"""``relfv status``: where every q_id stands, as a text table."""

from __future__ import annotations

import re
from pathlib import Path

from relfv.errors import InputError, RelfvError
from relfv.logs import printable
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.store.folder import QidFolder, was_moved_aside
from relfv.store.locks import held_by
from relfv.store.status import STATUS_FILE, QidStatus, read_status

_HEADER = ("q_id", "status", "rows", "best layer", "score", "accuracy", "updated", "reason")


def find_statuses(root: Path) -> list[Path]:
    """Artifacts folders below ``root`` that have a status: given a results root, a relation's folder or a q_id's."""
    patterns = (f"artifacts/{STATUS_FILE}", f"*/artifacts/{STATUS_FILE}", f"*/*/artifacts/{STATUS_FILE}")
    folders = [path.parent for pattern in patterns for path in root.glob(pattern)]
    kept = [folder for folder in folders if not was_moved_aside(folder.parent)]
    return sorted(kept, key=lambda folder: (folder.parent.parent.name, natural_key(folder.parent.name)))


def natural_key(text: str) -> list[tuple[int, int | str]]:
    """Sorts Q2 before Q10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", text) if part]


def status_table(root: Path) -> str:
    """One row a q_id. Raises InputError if there is nothing below ``root``."""
    folders = find_statuses(root)
    if not folders:
        raise InputError(f"{root}: no {STATUS_FILE} here or below; expected the folder that relfv run wrote to")
    rows = [tuple(map(printable, row)) for row in (_HEADER, *(_row(folder) for folder in folders))]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    counts: dict[str, int] = {}
    for row in rows[1:]:
        counts[row[1]] = counts.get(row[1], 0) + 1
    return "\n".join([*lines, "", ", ".join(f"{count} {name}" for name, count in counts.items())])


def _row(folder: Path) -> tuple[str, ...]:
    try:
        status = read_status(folder)
        assert status is not None
        best = _best(status)
    except Exception as problem:  # whatever one folder holds, the others get their row
        said = str(problem) if isinstance(problem, RelfvError) else f"{type(problem).__name__}: {problem}"
        return (folder.parent.name, "unreadable", "", "", "", "", "", said)
    updated = status.updated_at[:19].replace("T", " ")
    reason = status.reason or ""
    if status.status == "running" and held_by(QidFolder(folder, folder.parent.name).lock) is None:
        reason = "its process is gone; the same command goes on from here"
    return (status.q_id, status.status, str(status.q_row_count), *best, updated, reason)


def _best(status: QidStatus) -> tuple[str, str, str]:
    if status.status != "completed":
        return ("", "", "")
    summary = QidFolder(status.artifacts_dir, status.q_id).read(STEP6_SUMMARY)
    layer = summary["per_layer"][str(summary["best_layer"])]
    return (
        f"{summary['best_layer']} of {len(summary['expected_layers'])}",
        f"{summary['best_score']:+.3f}",
        f"{layer['acc_base']:.2f} -> {layer['acc_with']:.2f}",
    )
