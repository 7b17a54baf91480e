"""The relation CSV: word pairs grouped by q_id. All problems of a file are reported at once, with line numbers."""

from __future__ import annotations

import csv
import hashlib
import io
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from relfv.errors import InputError
from relfv.settings import SPEC_CSV
from relfv.types import Relation, WordPair

_COLUMNS = {
    "q_id": ("id", "q", "q_id", "qid"),
    "input": ("ex_a", "exa", "input"),
    "output": ("ex_b", "exb", "output"),
}
_NAME = "name"
"""Header of the optional column that says in words what a relation is."""
_LONGEST_NAME = 100
_Q_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
"""Pattern of a q_id. It has no dot in front (hidden files, ``..``), and no ``-``, which makes an option of a file name
and a formula of a CSV cell."""
_OF_RELFV = re.compile(
    r"report|tables|(run\.log|(run_manifest|plan)\.json).*|(cross_fv|aggregate\w*)\.\w+.*|.*\.replaced-.*",
    re.IGNORECASE,
)
_OF_WINDOWS = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?|.*\.", re.IGNORECASE)
"""Names that no folder can have on Windows, so that results could not be copied there."""
LINE_BREAKS_AND_CONTROLS = ("Cc", "Zl", "Zp")
"""Unicode categories: C0 and C1 controls, and the two separators that are line breaks to some readers."""
_MAX_BYTES = 64 << 20
"""Largest size of a CSV in bytes, about three million pairs. A larger file is a mistake, and finding that out must not
cost its size in memory."""
_MAX_ERRORS = 10
_MAX_NAMED = 20


def load_relations(path: Path) -> dict[str, Relation]:
    """Read ``path`` into one Relation per q_id, in order of first appearance.

    Header ``id,ex_A,ex_B`` or an accepted spelling, any case, with commas, semicolons or tabs between columns, which
    then stand between all columns; UTF-8 with or without BOM; rows of one q_id may stand
    anywhere; blank lines are skipped; spaces around a cell are not part of the word. A column ``name`` gives relations
    their words; every row of a q_id has the same, or none. Raises InputError naming every bad line (the first ten, then
    a count).
    """
    text = read_text(path)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator_of(text), strict=True)
    problems = _Problems()
    pairs: dict[str, list[WordPair]] = {}
    names: dict[str, str] = {}
    line = 1  # where the row at hand begins: a quoted cell may hold line breaks, or, never closed, the rest of the file
    try:
        column = columns_of(path, next(reader, None))
        line = reader.line_num + 1
        for row in reader:
            cells = [cell.strip() for cell in row]
            problem = _row_problem(cells, len(column), column) if any(cells) else None
            if problem:
                problems.add(line, problem)
            elif any(cells):
                pair = WordPair(cells[column["input"]], cells[column["output"]])
                pairs.setdefault(cells[column["q_id"]], []).append(pair)
                name = cells[column[_NAME]] if _NAME in column else ""
                if name and names.setdefault(cells[column["q_id"]], name) != name:
                    problems.add(line, _two_names(cells[column["q_id"]], names, name))
            line = reader.line_num + 1
    except csv.Error as problem:
        problems.add(line, f"not readable as CSV ({problem}; is a quote never closed?)")
    for problem in _case_clashes(pairs):
        problems.add(0, problem)
    if problems.n:
        raise InputError(f"{path}: {problems.n} problem(s): {problems.listed()}")
    if not pairs:
        raise InputError(f"{path}: no word pairs; expected a header id,ex_A,ex_B and one pair a row")
    answers = tuple(dict.fromkeys(pair.output for rows in pairs.values() for pair in rows))
    of_all = {q_id: tuple(rows) for q_id, rows in pairs.items()}
    return {q_id: Relation(q_id, rows, answers, names.get(q_id, ""), of_all) for q_id, rows in of_all.items()}


def called(q_id: str, name: str) -> str:
    """A q_id with its relation's words, where it has some: ``Q10 (adjective -> opposite)``."""
    return f"{q_id} ({name})" if name else q_id


def is_q_id(text: object) -> bool:
    """Whether ``text`` may be a q_id, and so a folder's name, here and on other systems."""
    return isinstance(text, str) and bool(_Q_ID.fullmatch(text)) and not _taken(text)


def require_q_ids(wanted: Iterable[str], relations: Iterable[str], flag: str, path: Path) -> None:
    """Raise InputError naming ``flag`` for q_ids that the CSV at ``path`` does not have."""
    there = dict.fromkeys(relations)
    unknown = [q_id for q_id in wanted if q_id not in there]
    if unknown:
        raise InputError(
            f"{flag}: {named(unknown)} not in {path}, which has {named(list(there))}; expected q_ids of the CSV"
        )


def named(q_ids: Sequence[str], between: str = ", ") -> str:
    """The first twenty of ``q_ids`` in one text, then a count of the others."""
    more = len(q_ids) - _MAX_NAMED
    return between.join([*q_ids[:_MAX_NAMED], f"and {more} more"] if more > 0 else q_ids)


def csv_file(name: str) -> Path:
    """The file that ``--relation_csv_path`` names. The spec's own, where it is not below the current folder, is the
    copy that comes with the package."""
    path = Path(name)
    if path == SPEC_CSV and not path.exists():
        package = Path(__file__).parent
        copies = [package / "demo" / SPEC_CSV.name, package.parents[1] / SPEC_CSV]  # in a wheel, in a clone
        return next((copy for copy in copies if copy.is_file()), path)
    return path


def relation_name(path: Path) -> str:
    """REL, the folder of a CSV's results: the file's name without its ending. Raises InputError for one that would be
    hidden, lead elsewhere (``...csv`` is ``..`` without its ending) or steer a terminal."""
    name = path.stem
    if name.startswith(".") or not name.isprintable():
        raise InputError(
            f"{path}: its results would go into a folder {name!a}; expected a file name that does not start with a "
            "dot and has no control characters, so rename the file"
        )
    return name


def rows_sha256(relation: Relation, corruption: str = "derange") -> str:
    """sha256 of what a q_id's results depend on in the CSV: its pairs in order, and where labels are drawn from other
    relations, all answers."""
    digest = hashlib.sha256()
    for pair in relation.pairs:
        digest.update(f"{len(pair.input)}:{pair.input}{len(pair.output)}:{pair.output}".encode())
    for answer in relation.csv_answers if corruption == "other" else ():
        digest.update(f"{len(answer)}:{answer}".encode())
    return digest.hexdigest()


class _Problems:
    """The problems of a file: the first ten, and the number of all. No more are kept, since a file of nothing else must
    not fill the memory."""

    def __init__(self) -> None:
        self.n = 0
        self._lines_of: dict[str, list[int]] = {}

    def add(self, line: int, problem: str) -> None:
        """Add a problem; ``line`` is 0 for one that belongs to no single line."""
        self.n += 1
        if self.n <= _MAX_ERRORS:
            self._lines_of.setdefault(problem, []).append(line)

    def listed(self) -> str:
        """The first ten problems in one text, lines with one and the same problem together, then a count."""
        shown = [
            f"line {', '.join(map(str, lines))}: {problem}" if all(lines) else problem
            for problem, lines in self._lines_of.items()
        ]
        more = self.n - _MAX_ERRORS
        return "; ".join([*shown, f"and {more} more"] if more > 0 else shown)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a BOM. Raises InputError for one that cannot be read, is too large, or is no
    text."""
    try:
        data = _read_bounded(path)
    except FileNotFoundError:
        found = f"is a link to {path.readlink()}, which is not there" if path.is_symlink() else "no such file"
        raise InputError(
            f"{path}: {found}; expected a relation CSV (see --relation_csv_path; paths count from the current folder)"
        ) from None
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        why = problem.strerror if isinstance(problem, OSError) else problem
        raise InputError(f"{path}: cannot be read ({why}); expected a relation CSV") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"{path}: line 1: begins as a UTF-16 file does; expected UTF-8, so save the file as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = _line_at(data, problem.start)
        raise InputError(f"{path}: line {line}: not UTF-8 (byte {problem.start}); save the file as UTF-8") from None
    if (nul := data.find(b"\0")) >= 0:
        line = _line_at(data, nul)
        raise InputError(f"{path}: line {line}: contains a NUL byte; expected a text file, saved as UTF-8 (not UTF-16)")
    return text


def _read_bounded(path: Path) -> bytes:
    """The bytes of a regular file. Raises InputError for one that is too large, or that can be read but once."""
    if not stat.S_ISREG(path.stat().st_mode) and not path.is_dir():
        raise InputError(
            f"{path}: is not a regular file; expected a relation CSV, so save what comes from a pipe first"
        )
    with path.open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise InputError(
            f"{path}: has {path.stat().st_size} bytes; expected a relation CSV of at most {_MAX_BYTES}, so leave out "
            "relations, or split the file"
        )
    return data


def _line_at(data: bytes, offset: int) -> int:
    """The line, from 1, that holds the byte at ``offset``, whichever way the file ends its lines."""
    return len((data[:offset] + b".").splitlines())


def separator_of(text: str) -> str:
    """The character that separates the columns of a CSV: whichever of commas, semicolons and tabs the header has most
    of."""
    header = re.split(r"[\r\n]", text, maxsplit=1)[0]
    return max(",;\t", key=header.count)  # the comma if there are equally many


def columns_of(path: Path, row: list[str] | None) -> dict[str, int]:
    """Column -> its index in a header: ``q_id``, ``input``, ``output``, and every other column. Raises InputError if
    one of the three is missing or there twice."""
    if row is None:
        raise InputError(f"{path}: is empty; expected a header id,ex_A,ex_B and one pair a row")
    names = [cell.strip().lower() for cell in row]
    if names and re.fullmatch("sep=.?", names[0]):
        raise InputError(f"{path}: line 1: is Excel's mark of the separator ({row[0]}); take this line out")
    column: dict[str, int] = {}
    problems = []
    for wanted, spellings in _COLUMNS.items():
        columns = [index for index, name in enumerate(names) if name in spellings]
        if len(columns) != 1:
            problems.append(f"{len(columns)} columns for the {wanted}; expected exactly one of {', '.join(spellings)}")
        else:
            column[wanted] = columns[0]
    if problems:
        other = "; columns are separated by commas, semicolons or tabs" if len(row) == 1 else ""
        raise InputError(
            f"{path}: line 1: header is {','.join(row)[:120]!r}, which has {'; and '.join(problems)} (any case), as in "
            f"id,ex_A,ex_B{other}"
        )
    if names.count(_NAME) > 1:
        raise InputError(f"{path}: line 1: {names.count(_NAME)} columns are called name; expected one, or none")
    column |= {_NAME: names.index(_NAME)} if _NAME in names else {}
    return column | {f"extra {i}": i for i in range(len(names)) if i not in column.values()}


def _row_problem(cells: list[str], width: int, column: dict[str, int]) -> str | None:
    if len(cells) != width:
        return f"{len(cells)} columns, expected {width} (quote words that contain the separator)"
    q_id = cells[column["q_id"]]
    if not q_id:
        return "the q_id is blank"
    if not _Q_ID.fullmatch(q_id):
        # ascii(): a letter of another script may look just like the one that is expected.
        return (
            f"q_id {q_id[:80]!a} cannot be a folder name; expected 1 to 64 of A-Z a-z 0-9 . _ -, not starting with "
            "a dot or a hyphen"
        )
    if why := _taken(q_id):
        return f"q_id {q_id!r} is a name that {why}; use another"
    for name in ("input", "output"):
        word = cells[column[name]]
        if not word:
            return f"the {name} of {q_id} is blank"
        if not word.isprintable() and any(unicodedata.category(c) in LINE_BREAKS_AND_CONTROLS for c in word):
            what = f"the {name} of {q_id} contains a line break or control character: {word[:40]!a}"
            return f"{what}; take it out, or let relfv import do so"
    return _name_problem(q_id, cells[column[_NAME]]) if _NAME in column else None


def _name_problem(q_id: str, name: str) -> str | None:
    if len(name) > _LONGEST_NAME or not name.isprintable():
        return (
            f"the name of {q_id} is {name[:40]!a}...; expected a few words on one line, at most {_LONGEST_NAME} "
            "characters, none of them a control character"
        )
    return None


def _two_names(q_id: str, names: dict[str, str], name: str) -> str:
    return (
        f"{q_id} is named {name!r} here and {names[q_id]!r} further up; expected one name for all rows of a q_id, or "
        "none, so correct one of them"
    )


def _taken(q_id: str) -> str | None:
    """Why the name ``q_id`` is taken, as words for an error message; None if it is free."""
    if _OF_RELFV.fullmatch(q_id):
        return "relfv gives to files beside the q_ids' folders"
    return "Windows keeps for itself" if _OF_WINDOWS.fullmatch(q_id) else None


def _case_clashes(q_ids: Iterable[str]) -> Iterator[str]:
    """Problems of q_ids that differ only in case: Q1 and q1 would share a folder on some file systems, and are one
    relation typed two ways on all of them."""
    seen: dict[str, str] = {}
    for q_id in q_ids:
        other = seen.setdefault(q_id.lower(), q_id)
        if other != q_id:
            yield f"q_id {q_id!r} and {other!r} differ only in case; use one spelling"
