"""``relfv status --watch``: the table again and again, for as long as a run goes."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from relfv.logs import show
from relfv.report.table import status_table
from relfv.store.folder import QidFolder
from relfv.store.locks import held_by
from relfv.store.statuses import find_statuses

_CLEAR = "\x1b[H\x1b[2J\x1b[3J"
"""Homes the cursor and empties a terminal."""


def watch(root: Path, every_s: float) -> None:
    """Show the table below ``root`` every ``every_s`` seconds, on a terminal in its place, until no process is at work
    there. Raises InputError if there is nothing below ``root``."""
    while True:
        going_on = _is_going_on(root)
        table, at = status_table(root), time.strftime("%Y-%m-%d %H:%M:%S")
        clear = _CLEAR if sys.stdout is not None and sys.stdout.isatty() else ""
        show(f"{clear}{at}\n{table}")
        if not going_on:
            return
        time.sleep(every_s)


def _is_going_on(root: Path) -> bool:
    """Whether some process holds a q_id. Ask before the table is made, so that the last table is whole. Between two
    q_ids none is held for an instant, so it is asked several times."""
    return any(_held(root) or time.sleep(pause) for pause in (0.3, 0.3, 0.0))


def _held(root: Path) -> bool:
    folders = find_statuses(root)
    return any(held_by(QidFolder(folder, folder.parent.name).lock) for folder in folders)
