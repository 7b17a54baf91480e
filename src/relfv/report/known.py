"""Cache of what the page and the tables say about the q_ids of a relation's folder, so that each file is read once for
as long as it does not change: in memory while a run goes on, and in ``.locks/`` from one command to the next.

What is kept only saves time. It counts while the sizes, times and inodes of the files that it was made from stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import orjson

from relfv.errors import RelfvError
from relfv.store.files import sha256_bytes
from relfv.store.folder import File, QidFolder
from relfv.store.index import Index, state_of
from relfv.store.status import STATUS_FILE, QidStatus, read_status
from relfv.store.statuses import artifacts_in

T = TypeVar("T")


@dataclass(frozen=True)
class Brief:
    """Summary of one q_id's status."""

    q_id: str
    name: str
    status: str
    reason: str | None
    n_layers: int
    model: str
    precision: str
    model_identity: str | None
    departures: Sequence[str]
    csv_path: str
    told: str
    """Hash of everything that page and tables say about the q_id or its files, except times: a status that was only
    written again asks for no new page."""

    @staticmethod
    def of(status: QidStatus) -> Brief:
        """Make the brief of a status that was read."""
        settings, fields = status.settings, status.fingerprint_fields
        files = [record.files for record in status.stages.values()]
        where = [status.q_id, status.name, status.status, status.reason, status.q_row_count]
        return Brief(
            status.q_id, status.name, status.status, status.reason, len(status.expected_layers), settings.model,
            settings.precision, fields.get("model_identity"), settings.departures(), settings.relation_csv_path,
            sha256_bytes(orjson.dumps([*where, settings.to_json(), files])),
        )  # fmt: skip


Found = dict[Path, "Brief | RelfvError"]
"""The q_ids directly in a relation's folder, by their ``artifacts`` folders; an error in place of the brief says why
one cannot be read."""


class Known:
    """Cached content about the q_ids of a relation's ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._briefs = Index(folder, "told")
        self.pages = Index(folder, "pages")
        """Content from each q_id's own page: its row of the relation's table, and why no share is shown."""
        self.tables = Index(folder, "tables")
        """Places of each q_id's rows in the tables."""
        self.sections: dict[Path, tuple[Any, ...]] = {}
        """Sections shown on a page of few q_ids, by the ``artifacts`` folder of the q_id."""
        self._last: tuple[QidStatus, QidFolder] | None = None

    def briefs(self) -> Found:
        """Read the briefs of all q_ids, as their statuses are now."""
        return {artifacts_dir: self._brief(artifacts_dir) for artifacts_dir in artifacts_in(self.folder)}

    def _brief(self, artifacts_dir: Path) -> Brief | RelfvError:
        def make() -> dict[str, Any]:
            self._last = _opened(artifacts_dir)
            return vars(Brief.of(self._last[0]))

        try:
            state = state_of([f"{artifacts_dir}/{STATUS_FILE}"])
            return Brief(**self._briefs.of(artifacts_dir.parent.name, state, make))
        except RelfvError as problem:
            return problem

    def opened(self, artifacts_dir: Path) -> tuple[QidStatus, QidFolder]:
        """The status of a q_id whose brief is known, and its folder to read from. The last q_id that was read again or
        asked for is kept, so that page and tables share it. Raises RelfvError."""
        if self._last is None or self._last[0].artifacts_dir != artifacts_dir:
            self._last = _opened(artifacts_dir)
        return self._last

    def write(self) -> None:
        """Keep the cached content for the next command."""
        for index in (self._briefs, self.pages, self.tables):
            index.write()


class _ReadOnce(QidFolder):
    """A q_id's folder that reads a file again only if, by the file system's word, it was written since."""

    def read_at(self, path: Path, file: File[T]) -> T:
        state = state_of([str(path)])
        known = self._parsed.get(path)
        if known is None or known[0] != state:
            known = self._parsed[path] = state, file.read(path)
        return known[1]


def _opened(artifacts_dir: Path) -> tuple[QidStatus, QidFolder]:
    status = read_status(artifacts_dir)
    if status is None:
        raise RelfvError(f"{artifacts_dir / STATUS_FILE}: is not there any more")
    return status, _ReadOnce(status.artifacts_dir, status.q_id)
