"""Carry a relation's name from the CSV into the status of its q_id, where the page, the figures and the tables find it.

They are no part of the experiment: a relation that gets another name keeps its results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

from relfv.errors import RelfvError
from relfv.relations import load_relations, rows_sha256
from relfv.report.known import Brief, Known
from relfv.store.folder import QidFolder
from relfv.store.index import Index, state_of
from relfv.store.locks import lock
from relfv.store.status import QidStatus, read_status
from relfv.store.statuses import find_statuses
from relfv.types import Relation

log = logging.getLogger(__name__)


def take_names(folder: Path, relations: Mapping[str, Relation]) -> None:
    """Give the q_ids in a relation's ``folder`` the names of the CSV that is at hand."""
    for q_id, relation in relations.items():
        _rename(folder / q_id / "artifacts", relation)


def take_names_below(root: Path) -> None:
    """Give all q_ids at or below ``root`` the names that the CSVs they were made from have now, where those are still
    there."""
    read = cache(_relations)
    below = {path.absolute() for path in find_statuses(root)}
    for folder in dict.fromkeys(path.parents[1] for path in sorted(below)):
        known, names = Known(folder), Index(folder, "names")
        for artifacts_dir, brief in known.briefs().items():
            if isinstance(brief, Brief) and artifacts_dir in below:
                state = state_of([brief.csv_path], brief.told)
                names.of(brief.q_id, state, lambda a=artifacts_dir, b=brief: _has_its_name(a, b, read), bool)
        known.write()
        names.write()


def _has_its_name(artifacts_dir: Path, brief: Brief, read: Callable[[str], dict[str, Relation]]) -> bool:
    """Whether a q_id has the name that its CSV has now; if not, it is renamed."""
    relation = read(brief.csv_path).get(brief.q_id)
    if relation is None or relation.name == brief.name:
        return True
    _rename(artifacts_dir, relation)
    return False


def _relations(csv_path: str) -> dict[str, Relation]:
    try:
        return load_relations(Path(csv_path))
    except RelfvError:
        return {}


def _rename(artifacts_dir: Path, relation: Relation) -> None:
    """Record the new name of ``relation`` if the q_id was made from it and its name differs. A process that is at work
    in the folder does so itself."""
    try:
        status = read_status(artifacts_dir)
        if status is None or not _is_of(relation, status) or relation.name == status.name:
            return
        with lock(QidFolder(artifacts_dir, status.q_id).lock) as holder:
            if not holder and (status := read_status(artifacts_dir)):
                status.name = relation.name
                status.write()
    except RelfvError as problem:  # reported where it matters
        log.debug("%s", problem)


def _is_of(relation: Relation, status: QidStatus) -> bool:
    return rows_sha256(relation, status.settings.corruption) == status.fingerprint_fields.get("rows_sha256")
