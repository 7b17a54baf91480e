"""The relation CSV: word pairs grouped by q_id. What is wrong with a file is said all at once, with line numbers."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from pathlib import Path

from relfv.errors import InputError
from relfv.types import Relation, WordPair

_COLUMNS = {
    "q_id": ("id", "q", "q_id", "qid"),
    "input": ("ex_a", "exa", "input"),
    "output": ("ex_b", "exb", "output"),
}
_Q_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_RESERVED = ("report", "run.log", "run_manifest.json")
_REPLACED = ".replaced-"
_MAX_ERRORS = 10


def load_relations(path: Path) -> dict[str, Relation]:
    """Read ``path`` into one Relation per q_id, in order of first appearance.

    Header ``id,ex_A,ex_B`` or an accepted spelling, any case; UTF-8 with or without BOM; rows of one q_id may stand
    anywhere; blank lines are skipped; spaces around a cell are not part of the word. Raises InputError naming every
    bad line (the first ten, then a count).
    """
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    problems: list[tuple[int, str]] = []
    pairs: dict[str, list[WordPair]] = {}
    try:
        column = _header(path, next(reader, None))
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            problem = _row_problem(cells, len(column), column)
            if problem:
                problems.append((reader.line_num, problem))
            else:
                pair = WordPair(cells[column["input"]], cells[column["output"]])
                pairs.setdefault(cells[column["q_id"]], []).append(pair)
    except csv.Error as problem:
        problems.append((reader.line_num, f"not readable as CSV ({problem})"))
    problems += [(0, problem) for problem in _case_clashes(list(pairs))]
    if problems:
        raise InputError(f"{path}: {len(problems)} problem(s): {_listed(problems)}")
    if not pairs:
        raise InputError(f"{path}: no word pairs; expected a header id,ex_A,ex_B and one pair a row")
    return {q_id: Relation(q_id, tuple(rows)) for q_id, rows in pairs.items()}


def file_sha256(path: Path) -> str:
    """sha256 of the file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def rows_sha256(relation: Relation) -> str:
    """sha256 of one q_id's pairs in order: what its results depend on, whatever else the CSV holds."""
    digest = hashlib.sha256()
    for pair in relation.pairs:
        digest.update(f"{len(pair.input)}:{pair.input}{len(pair.output)}:{pair.output}".encode())
    return digest.hexdigest()


def _listed(problems: list[tuple[int, str]]) -> str:
    """The first ten, lines with one and the same problem together, then a count."""
    lines_of: dict[str, list[int]] = {}
    for line, problem in problems[:_MAX_ERRORS]:
        lines_of.setdefault(problem, []).append(line)
    shown = [
        f"line {', '.join(map(str, lines))}: {problem}" if all(lines) else problem
        for problem, lines in lines_of.items()
    ]
    more = len(problems) - _MAX_ERRORS
    return "; ".join([*shown, f"and {more} more"] if more > 0 else shown)


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; expected a relation CSV (see --relation_csv_path; paths count from the current folder)"
        ) from None
    except OSError as problem:
        raise InputError(f"{path}: cannot be read ({problem.strerror}); expected a relation CSV") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data[: problem.start].count(b"\n") + 1
        raise InputError(f"{path}: line {line}: not UTF-8 (byte {problem.start}); save the file as UTF-8") from None
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise InputError(f"{path}: line {line}: contains a NUL byte; expected a text file")
    return text


def _header(path: Path, row: list[str] | None) -> dict[str, int]:
    if row is None:
        raise InputError(f"{path}: is empty; expected a header id,ex_A,ex_B and one pair a row")
    names = [cell.strip().lower() for cell in row]
    column: dict[str, int] = {}
    for wanted, spellings in _COLUMNS.items():
        found = [index for index, name in enumerate(names) if name in spellings]
        if len(found) != 1:
            raise InputError(
                f"{path}: line 1: header is {','.join(row)!r}, which has {len(found)} columns for the {wanted}; expected "
                f"exactly one of {', '.join(spellings)} (any case), as in id,ex_A,ex_B"
            )
        column[wanted] = found[0]
    return column | {f"extra {i}": i for i in range(len(names)) if i not in column.values()}


def _row_problem(cells: list[str], width: int, column: dict[str, int]) -> str | None:
    if len(cells) != width:
        return f"{len(cells)} columns, expected {width} (quote words that contain a comma)"
    q_id = cells[column["q_id"]]
    if not _Q_ID.fullmatch(q_id):
        return f"q_id {q_id[:80]!r} cannot be a folder name; expected 1 to 64 of A-Z a-z 0-9 . _ -, not starting with a dot"
    if q_id.lower() in _RESERVED or _REPLACED in q_id:
        return f"q_id {q_id!r} is a name that relfv gives to files beside the q_ids' folders; use another"
    for name in ("input", "output"):
        word = cells[column[name]]
        if not word:
            return f"the {name} of {q_id} is blank"
        if any(ord(char) < 32 or ord(char) == 127 for char in word):
            return f"the {name} of {q_id} contains a line break or control character: {word[:40]!r}"
    return None


def _case_clashes(q_ids: list[str]) -> list[str]:
    """Q1 and q1 would share a folder on some file systems, and are one relation typed two ways on all of them."""
    seen: dict[str, str] = {}
    problems = []
    for q_id in q_ids:
        other = seen.setdefault(q_id.lower(), q_id)
        if other != q_id:
            problems.append(f"q_id {q_id!r} and {other!r} differ only in case; use one spelling")
    return problems
