"""``tables/*.csv`` of a relation's folder: written whole, each beside a record of what all of them were made from."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from relfv import __version__
from relfv.errors import InputError, RelfvError
from relfv.report.known import Brief, Found, Known
from relfv.report.page import relations_of
from relfv.report.tables import READ, WRITTEN, Row, columns_of, rows_of
from relfv.store.files import (
    require_no_links,
    sha256_bytes,
    sha256_file,
    write_atomic,
)
from relfv.store.folder import QidFolder
from relfv.store.formats import csv_bytes, csv_cell, read_json, sealed_bytes, unsealed
from relfv.store.index import state_of
from relfv.store.locks import sole_writer
from relfv.store.pieces import InPieces, write_in_pieces
from relfv.store.status import QidStatus
from relfv.store.statuses import statuses_in

if TYPE_CHECKING:
    from pandas import DataFrame  # type: ignore[import-not-found]

log = logging.getLogger(__name__)

TABLES_FOLDER = "tables"
_RECORD = "made_from.json"


def statuses_of(folder: Path) -> list[QidStatus]:
    """Statuses of the q_ids directly in a relation's ``folder``; one that cannot be read is reported and left out."""
    return statuses_in(folder, _say)


def _say(problem: RelfvError) -> None:
    log.warning("%s", problem)


def table_of(table: str, statuses: list[QidStatus]) -> list[Row]:
    """All rows of a table. A q_id whose files cannot be read has no rows, which is reported."""
    return [row for status in statuses for row in _rows_of(table, status) or ()]


def _rows_of(table: str, status: QidStatus, qid: QidFolder | None = None) -> list[Row] | None:
    """The rows of one q_id in a table; None where they cannot be made."""
    try:
        return rows_of(table, status, qid)
    except Exception as problem:  # whatever is wrong in one folder, the others get their rows
        log.warning("%s is left out of the table %s: %s", status.q_id, table, problem)
        return None


def write_tables(folder: Path, known: Known | None = None) -> Path:
    """Write every table of a relation's ``folder``. -> the folder they are in. ``known`` is the cache that a run keeps
    of it."""
    place, known = folder / TABLES_FOLDER, known or Known(folder)
    require_no_links(place, below=folder)
    # Read inside the lock: the last to write must be the last to read, or it would leave out what another run did.
    with sole_writer(place):
        found = known.briefs()
        for problem in found.values():
            if isinstance(problem, RelfvError):
                _say(problem)
        names = [f"{table}.csv" for table in WRITTEN]
        with write_in_pieces([place / name for name in (*names, _RECORD)]) as (*files, record):
            _write_csvs(known, found, [place / name for name in names], files)
            digests = {name: file.sha256 for name, file in zip(names, files, strict=True)}
            record.write(sealed_bytes({"made_from": _made_from(found), "files": digests}))
    known.write()
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
    """A table as a DataFrame. Raises InputError without pandas."""
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


def _write_csvs(known: Known, found: Found, paths: Sequence[Path], files: Sequence[InPieces]) -> None:
    """Write the tables q_id after q_id, so that only one q_id's rows are in memory. Rows are copied from the last
    tables, at ``paths``, where the files that they were made from have not changed."""
    with ExitStack() as stack:
        last = [stack.enter_context(_opened(path)) for path in paths]
        ends = [0] * len(files)

        def write(pieces: Sequence[bytes]) -> list[tuple[int, int]]:
            """Write the lines. -> their place in each table: start and number of bytes."""
            starts = [*ends]
            for i, piece in enumerate(pieces):
                files[i].write(piece)
                ends[i] += len(piece)
            return [(start, len(piece)) for start, piece in zip(starts, pieces, strict=True)]

        write([csv_bytes([columns_of(table)]) for table in WRITTEN])
        for artifacts_dir, brief in found.items():
            if isinstance(brief, Brief):
                q_id, state = artifacts_dir.parent.name, state_of(_read_for(artifacts_dir, brief), brief.told)
                lines = _as_written(last, known.tables.known(q_id, state)) or _lines(known, artifacts_dir)
                whole = [one for one in lines if one is not None]
                places = write([one or b"" for one in lines])
                if len(whole) == len(lines):  # keep complete rows only: missing ones are reported every time
                    known.tables.keep(q_id, state, [places, sha256_bytes(b"".join(whole))])


def _opened(path: Path) -> BinaryIO:
    """Open an earlier table; empty where it cannot be read, since its lines are then made again."""
    try:
        return path.open("rb")
    except OSError:
        return io.BytesIO()


def _read_for(artifacts_dir: Path, brief: Brief) -> Iterator[str]:
    """The files that a q_id's rows are made from."""
    for file in READ if brief.status == "completed" else ():
        for layer in range(brief.n_layers) if file.per_layer else [None]:
            yield f"{artifacts_dir}/{file.named(brief.q_id, layer)}"


def _as_written(last: Sequence[BinaryIO], kept: Any) -> list[bytes] | None:
    """Lines of a q_id in each of the ``last`` tables; None unless they are there as they were written."""
    if kept is None:
        return None
    pieces = []
    try:
        for file, (start, size) in zip(last, kept[0], strict=True):
            file.seek(start)
            pieces.append(file.read(size))
    except OSError:
        return None
    return pieces if sha256_bytes(b"".join(pieces)) == kept[1] else None


def _lines(known: Known, artifacts_dir: Path) -> list[bytes | None]:
    """Lines of a q_id in each table, made from its files; None for those that cannot be made."""
    try:
        status, qid = known.opened(artifacts_dir)
    except RelfvError as problem:  # the q_id has just gone
        _say(problem)
        return [None] * len(WRITTEN)
    tables = (_rows_of(table, status, qid) for table in WRITTEN)
    return [
        None if rows is None else csv_bytes([csv_cell(value) for value in row.values()] for row in rows)
        for rows in tables
    ]


def are_up_to_date(folder: Path, found: Found) -> bool:
    """Whether the tables are whole, and made from the q_ids that were ``found`` in the folder."""
    try:
        record = unsealed(read_json(folder / TABLES_FOLDER / _RECORD), folder / TABLES_FOLDER / _RECORD)
        same = record["made_from"] == _made_from(found)
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


def _made_from(found: Found) -> str:
    """Hash of everything the tables tell, except times."""
    told = [brief.told for brief in found.values() if isinstance(brief, Brief)]
    return sha256_bytes(json.dumps([__version__, *told]).encode())
