"""A relation's words, from the CSV into the status of its q_id, where the page, the figures and the tables find them.

They are no part of the experiment: a relation that gets another name keeps its results.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache
from itertools import groupby
from pathlib import Path

from relfv.errors import RelfvError
from relfv.relations import load_relations, rows_sha256
from relfv.report.table import find_statuses
from relfv.store.folder import QidFolder
from relfv.store.index import Index
from relfv.store.locks import lock
from relfv.store.status import STATUS_FILE, QidStatus, read_status
from relfv.types import Relation

log = logging.getLogger(__name__)


def take_names(folder: Path, relations: Mapping[str, Relation]) -> None:
    """Give the q_ids in a relation's ``folder`` the names of the CSV that is at hand."""
    for q_id, relation in relations.items():
        _rename(folder / q_id / "artifacts", lambda _, relation=relation: relation)


def take_names_below(root: Path) -> None:
    """Give all q_ids at or below ``root`` the names that the CSVs they were made from have now, where those are still
    there."""
    read = cache(_relations)
    for relation, of_relation in groupby(find_statuses(root), key=lambda path: path.absolute().parents[1]):
        index, csv_path = Index(relation, "names"), ""
        for artifacts_dir in of_relation:
            csv_path = _named(index, artifacts_dir, csv_path, read)
        index.write()


def _named(index: Index, artifacts_dir: Path, expected: str, read: Callable[[str], dict[str, Relation]]) -> str:
    """Give a q_id its name, unless that was done and neither its status nor its CSV was written since. -> that CSV, the
    ``expected`` one where it is made from the same as the q_id before it."""

    def make() -> str:
        return _rename(artifacts_dir, lambda status: read(status.settings.relation_csv_path).get(status.q_id))

    files = [f"{artifacts_dir}/{STATUS_FILE}", expected]
    csv_path = index.of(artifacts_dir.absolute().parent.name, files, make, lambda found: found == expected)
    return csv_path if csv_path == expected else make()


def _relations(csv_path: str) -> dict[str, Relation]:
    try:
        return load_relations(Path(csv_path))
    except RelfvError:
        return {}


def _rename(artifacts_dir: Path, found: Callable[[QidStatus], Relation | None]) -> str:
    """Record another name, if ``found`` gives the relation that a q_id was made from and it has one. Whoever is at work
    in the folder does so itself. -> the CSV that the q_id was made from, empty where it may have to be done again."""
    try:
        status = read_status(artifacts_dir)
        relation = found(status) if status else None
        if status is None:
            return ""
        if relation is None or not _is_of(relation, status) or relation.name == status.name:
            return status.settings.relation_csv_path
        with lock(QidFolder(artifacts_dir, status.q_id).lock) as holder:
            if not holder and (status := read_status(artifacts_dir)):
                status.name = relation.name
                status.write()
    except RelfvError as problem:  # said where it matters
        log.debug("%s", problem)
    return ""


def _is_of(relation: Relation, status: QidStatus) -> bool:
    return rows_sha256(relation, status.settings.corruption) == status.fingerprint_fields.get("rows_sha256")
