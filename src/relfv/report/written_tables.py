"""``tables/*.csv`` of a relation's folder: written whole, each beside a record of what all were made from."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relfv import __version__
from relfv.errors import InputError, RelfvError
from relfv.report.page import relations_of, statuses_in
from relfv.report.tables import WRITTEN, Row, columns_of, rows_of
from relfv.store.files import (
    require_no_links,
    sha256_bytes,
    sha256_file,
    write_atomic,
)
from relfv.store.folder import QidFolder
from relfv.store.formats import csv_bytes, csv_cell, read_json, sealed_bytes, unsealed
from relfv.store.locks import sole_writer
from relfv.store.pieces import InPieces, write_in_pieces
from relfv.store.status import QidStatus

if TYPE_CHECKING:
    from pandas import DataFrame  # type: ignore[import-not-found]

log = logging.getLogger(__name__)

TABLES_FOLDER = "tables"
_RECORD = "made_from.json"


def statuses_of(folder: Path) -> list[QidStatus]:
    """Of the q_ids right in a relation's ``folder``; one that cannot be read is said and left out."""
    found = statuses_in(folder).values()
    for problem in found:
        if isinstance(problem, RelfvError):
            log.warning("%s", problem)
    return [status for status in found if isinstance(status, QidStatus)]


def table_of(table: str, statuses: list[QidStatus]) -> list[Row]:
    """All rows of a table. A q_id whose files cannot be read has none, which is said."""
    return [row for status in statuses for row in _rows_of(table, status)]


def _rows_of(table: str, status: QidStatus, qid: QidFolder | None = None) -> list[Row]:
    try:
        return rows_of(table, status, qid)
    except Exception as problem:  # whatever one folder holds, the others get their rows
        log.warning("%s is left out of the table %s: %s", status.q_id, table, problem)
        return []


def write_tables(folder: Path) -> Path:
    """Write every table of a relation's ``folder``. -> the folder they are in."""
    place = folder / TABLES_FOLDER
    require_no_links(place, below=folder)
    # What is written last must also have been read last, or one of two runs would leave out what the other did.
    with sole_writer(place):
        statuses = statuses_of(folder)
        names = [f"{table}.csv" for table in WRITTEN]
        with write_in_pieces([place / name for name in (*names, _RECORD)]) as (*files, record):
            _write_csvs(statuses, dict(zip(WRITTEN, files, strict=True)))
            digests = {name: file.sha256 for name, file in zip(names, files, strict=True)}
            record.write(sealed_bytes({"made_from": _made_from(statuses), "files": digests}))
    return place


def export(folder: Path, *, parquet: bool = False) -> Path:
    """Write the tables of every relation at or below ``folder`` again, also as Parquet. -> the first one's folder.

    Raises InputError if there is none, or without pandas and pyarrow where Parquet is asked for.
    """
    relations = relations_of(folder)
    frames = {rel: {t: frame_of(t, statuses_of(rel)) for t in WRITTEN} for rel in relations if parquet}
    places = [write_tables(relation) for relation in relations]
    for relation, tables in frames.items():
        for table, frame in tables.items():
            write_atomic(relation / TABLES_FOLDER / f"{table}.parquet", _parquet(frame))
    return places[0]


def frame_of(table: str, statuses: list[QidStatus]) -> DataFrame:
    """A table as a frame. Raises InputError without pandas."""
    try:
        import pandas  # type: ignore[import-not-found]
    except ImportError:
        raise InputError("frames need pandas, which is not installed; run: pip install 'relfv[pandas]'") from None
    return pandas.DataFrame(table_of(table, statuses), columns=list(columns_of(table)))


def _parquet(frame: DataFrame) -> bytes:
    try:
        return frame.to_parquet(None, index=False)
    except ImportError:
        raise InputError(
            "--parquet: needs pyarrow, which is not installed; run: pip install 'relfv[parquet]'"
        ) from None


def _write_csvs(statuses: list[QidStatus], files: dict[str, InPieces]) -> None:
    """q_id after q_id: the rows of one are in memory, and each of its files is read once."""
    for table, file in files.items():
        file.write(csv_bytes([columns_of(table)]))
    for status in statuses:
        qid = QidFolder(status.artifacts_dir, status.q_id)
        for table, file in files.items():
            rows = _rows_of(table, status, qid)
            file.write(csv_bytes([csv_cell(value) for value in row.values()] for row in rows))


def are_up_to_date(folder: Path, statuses: list[QidStatus]) -> bool:
    """Whether the tables are whole, and made from these ``statuses``, all of the folder."""
    try:
        record = unsealed(read_json(folder / TABLES_FOLDER / _RECORD), folder / TABLES_FOLDER / _RECORD)
        same = record["made_from"] == _made_from(statuses)
        return same and all(sha256_file(folder / TABLES_FOLDER / n) == digest for n, digest in record["files"].items())
    except (RelfvError, KeyError, TypeError, AttributeError):
        return False


def tables_problem(folder: Path) -> tuple[str, str] | None:
    """-> (a file of ``tables/`` that is not as it was written, what is wrong); None if all are, or none was made."""
    place = folder / TABLES_FOLDER
    if not place.is_dir():
        return None
    try:
        files = unsealed(read_json(place / _RECORD), place / _RECORD)["files"]
        wrong = [name for name, digest in files.items() if sha256_file(place / name) != digest]
    except (RelfvError, KeyError, TypeError, AttributeError):
        wrong = [_RECORD]
    return (
        (f"{TABLES_FOLDER}/{wrong[0]}", f"is not as it was written; 'relfv export {folder}' makes it again")
        if wrong
        else None
    )


def _made_from(statuses: list[QidStatus]) -> str:
    """A hash of what the tables tell of, but for times."""
    told: list[Any] = [__version__]
    for status in statuses:
        files = [record.files for record in status.stages.values()]
        told.append([status.q_id, status.status, status.reason, status.q_row_count, status.settings.to_json(), files])
    return sha256_bytes(json.dumps(told).encode())
