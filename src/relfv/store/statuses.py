"""Find q_ids: the statuses below a results root, a relation's folder or a q_id's."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from relfv.errors import RelfvError, RunError
from relfv.store.folder import was_moved_aside
from relfv.store.status import STATUS_FILE, QidStatus, read_status


def find_statuses(root: Path) -> list[Path]:
    """Artifacts folders below ``root`` that have a status: given a results root, a relation's folder or a q_id's."""
    found = []
    for folder in _with_status(str(root), depth=2):  # as text: making thousands of Paths takes time
        above, _, name = folder.rpartition("/")
        if not was_moved_aside(name):
            found.append((above.rpartition("/")[2], natural_key(name), folder))
    return [Path(f"{folder}/artifacts") for *_, folder in sorted(found)]


def has_q_ids(folder: Path) -> bool:
    """Whether a relation's ``folder`` directly holds a q_id."""
    places = _with_status(str(folder), depth=1)
    return any(Path(place) != folder and not was_moved_aside(Path(place).name) for place in places)


def artifacts_in(folder: Path) -> list[Path]:
    """Artifacts folders of the q_ids directly in a relation's ``folder``."""
    return [path for path in find_statuses(folder) if path.parent.parent == folder]


def statuses_in(folder: Path, say: Callable[[RelfvError], None] | None = None) -> list[QidStatus]:
    """Statuses of the q_ids directly in a relation's ``folder``; ``say`` is told why one cannot be read."""
    statuses = []
    for artifacts_dir in artifacts_in(folder):
        try:
            status = read_status(artifacts_dir)
            assert status is not None
            statuses.append(status)
        except RelfvError as problem:
            if say:
                say(problem)
    return statuses


def fields_of(folder: Path, q_ids: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The fingerprint fields of each q_id of a relation's ``folder``, empty where no sound status is."""
    fields: dict[str, dict[str, Any]] = {}
    for q_id in q_ids:
        fields[q_id] = {}
        with suppress(RunError):
            status = read_status(folder / q_id / "artifacts")
            fields[q_id] = status.fingerprint_fields if status else {}
    return fields


def _with_status(folder: str, depth: int) -> Iterator[str]:
    if os.path.exists(f"{folder}/artifacts/{STATUS_FILE}"):  # noqa: PTH110
        yield folder
    elif depth:
        with suppress(OSError), os.scandir(folder) as entries:
            for below in [entry.path for entry in entries if entry.is_dir()]:
                yield from _with_status(below, depth - 1)


def natural_key(text: str) -> list[tuple[int, int | str]]:
    """Key that sorts Q2 before Q10."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", text) if part]
