"""``report/index.html``: all q_ids of a relation on one page, in one file, from saved artifacts alone; and an index
where a results folder holds several relations."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from relfv import __version__
from relfv.errors import InputError, RelfvError
from relfv.logs import printable
from relfv.relations import called
from relfv.report.content import cross_of, link, models_of, of_qid, run_of, with_arrow
from relfv.report.table import find_statuses
from relfv.report.together import together_of
from relfv.stages.aggregate import AGGREGATE
from relfv.stages.cross import CROSS
from relfv.store.files import read_bytes, require_no_links, sha256_bytes, sha256_file, write_atomic
from relfv.store.locks import sole_writer
from relfv.store.status import QidStatus, read_status

_NO_QID = "no q_id here; expected a relation's results folder, e.g. results_fv/relation_qwise/relationA_ex"


def write_pages(folder: Path) -> Path:
    """The page of every relation at or below ``folder``, which may be a q_id's; an index where there are several.
    -> the page to open first.

    Raises InputError as ``write_report`` does.
    """
    relations = relations_of(folder)
    pages = [write_report(relation) for relation in relations]
    return write_index(folder) if len(pages) > 1 else pages[0]


def relations_of(folder: Path) -> list[Path]:
    """The relations' folders whose q_ids are found at or below ``folder``. Raises InputError if there is none."""
    found = find_statuses(folder)
    if not found:
        raise InputError(f"{folder}: {_NO_QID}")
    # What is given as "." has no parent by its name.
    of_a_qid = [folder.absolute().parent if path.parent == folder else path.parent.parent for path in found]
    return list(dict.fromkeys(of_a_qid))


def write_report(folder: Path) -> Path:
    """Write ``folder/report/index.html``. A q_id whose files cannot be read is listed as such; it does not stop the
    page. An index above it is made again, too.

    Raises InputError if ``folder`` holds no q_id, or its ``report`` is a link to elsewhere.
    """
    if not _artifacts_dirs(folder):
        raise InputError(f"{folder}: {_NO_QID}")
    path = _write(folder, lambda: _of_relation(folder), "page.html.j2", lambda: _made_from(folder))
    above = folder.absolute().parent
    if _has_index(above):
        write_index(above)
    return path


def _has_index(folder: Path) -> bool:
    """Whether an index of ours is there: it is no relation's page, and no file of somebody else's."""
    try:
        return _sealed_from(read_bytes(page_path(folder))) is not None and folder not in relations_of(folder)
    except OSError:
        return False


def write_index(folder: Path) -> Path:
    """Write ``folder/report/index.html``, which leads to the pages of the relations below ``folder``."""
    return _write(folder, lambda: _of_index(folder), "index.html.j2", lambda: sha256_bytes(__version__.encode()))


def _write(folder: Path, content: Any, template: str, made_from: Any) -> Path:
    require_no_links(folder / "report", below=folder)
    path = page_path(folder)
    # What is written last must also have been read last, or one of two runs would leave out what the other did.
    with sole_writer(path.parent):
        origin = made_from()
        return write_atomic(path, _with_seal(_environment().get_template(template).render(**content()), origin))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("relfv.report"), undefined=StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["percent"] = lambda share: f"{round(100 * share) + 0}%"
    environment.filters["visible"] = lambda token: printable(token.replace("\n", "⏎").replace(" ", "·"))
    return environment


def page_path(folder: Path) -> Path:
    """Where the page of ``folder`` is."""
    return folder / "report" / "index.html"


# --- its seal: a hash of itself, and of what it was made from ---------------------------------------------------------

_SEAL = re.compile(rb"<!-- made from (\w{64}), sha256 of what is above: (\w{64}) -->\n")


def page_problem(folder: Path) -> str | None:
    """What is wrong with the page of ``folder``; None for a page as it was written, of an earlier version, or none."""
    try:
        page = read_bytes(page_path(folder))
    except FileNotFoundError:
        return None
    except OSError as problem:
        return f"cannot be read ({problem.strerror})"
    if _sealed_from(page) or page.endswith(b"</html>"):  # as earlier versions ended theirs
        return None
    return "is not as it was written; 'relfv report' or the next 'relfv run' makes it again"


def is_up_to_date(folder: Path) -> bool:
    """Whether the page is whole, and made from what now lies beside it."""
    try:
        page = read_bytes(page_path(folder))
    except OSError:
        return False
    return _sealed_from(page) == _made_from(folder)


def _with_seal(page: str, made_from: str) -> bytes:
    above = page.encode() + b"\n"
    return above + f"<!-- made from {made_from}, sha256 of what is above: {sha256_bytes(above)} -->\n".encode()


def _sealed_from(page: bytes) -> str | None:
    """What a page was made from, if it is as it was written."""
    above, _, last = page.removesuffix(b"\n").rpartition(b"\n")
    found = _SEAL.fullmatch(last + b"\n")
    return found[1].decode() if found and found[2].decode() == sha256_bytes(above + b"\n") else None


def _made_from(folder: Path) -> str:
    """A hash of what the page tells of, but for times: a status that was only written again asks for no new page."""
    told: list[Any] = [__version__, sha256_file(folder / CROSS), sha256_file(folder / AGGREGATE)]
    for artifacts_dir in _artifacts_dirs(folder):
        try:
            status = read_status(artifacts_dir)
            assert status is not None
            told.append(_told(folder, status))
        except RelfvError as problem:
            told.append([artifacts_dir.parent.name, str(problem)])
    return sha256_bytes(json.dumps(told).encode())


def _told(folder: Path, status: QidStatus) -> list[Any]:
    files = [record.files for record in status.stages.values()]
    where = [status.q_id, status.name, status.status, status.reason, status.q_row_count]
    return [*where, status.settings.to_json(), files, run_of(folder, status)]


# --- what is on it ---------------------------------------------------------------------------------------------------


def shown(folder: Path, status: QidStatus) -> dict[str, Any]:
    """What the page of a relation's ``folder`` shows of a completed q_id: its ``row`` of the table and its ``section``,
    as they stand there, and ``why`` no share is shown. Raises an exception of any kind where its files are of another
    shape than relfv writes."""
    content = of_qid(folder, status)
    templates = _environment()
    # Each on its own: what a template cannot show must not take the others with it. Both are escaped already.
    return {
        "why": content["share"]["why"],
        "row": Markup(templates.get_template("row.html.j2").render(q=content)),
        "section": Markup(templates.get_template("qid.html.j2").render(q=content)),
    }


_SHOWN: dict[Path, tuple[list[Any], dict[str, Any]]] = {}
"""By its status' path what was shown of a q_id, and of which state of its files."""


def _shown_once(folder: Path, status: QidStatus) -> dict[str, Any]:
    """``shown``, made anew only where a file has changed: a run writes its page after every q_id."""
    files = [status.artifacts_dir / name for record in status.stages.values() for name in record.files]
    stats = [path.stat() if path.exists() else None for path in files]
    state = [_told(folder, status), [stat and (stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats]]
    path = status.path.absolute()
    if path not in _SHOWN or _SHOWN[path][0] != state:
        _SHOWN[path] = state, shown(folder, status)
    return _SHOWN[path][1]


def _artifacts_dirs(folder: Path) -> list[Path]:
    """Of the q_ids right in ``folder``."""
    return [path for path in find_statuses(folder) if path.parent.parent == folder]


def _of_relation(folder: Path) -> dict[str, Any]:
    completed: list[dict[str, Any]] = []
    others: list[dict[str, str]] = []
    statuses: list[QidStatus] = []
    for artifacts_dir in _artifacts_dirs(folder):
        try:
            status = read_status(artifacts_dir)
            assert status is not None
            statuses.append(status)
            if status.status == "completed":
                completed.append(_shown_once(folder, status))
            else:
                named = called(status.q_id, with_arrow(status.name))
                others.append({"q_id": named, "status": status.status, "reason": status.reason or ""})
        except Exception as problem:
            said = str(problem) if isinstance(problem, RelfvError) else f"{type(problem).__name__}: {problem}"
            others.append({"q_id": artifacts_dir.parent.name, "status": "unreadable", "reason": said})
    states = ["completed"] * len(completed) + [other["status"] for other in others]
    return {
        "title": folder.resolve().name,
        "version": __version__,
        "models": models_of(folder, statuses),
        "counts": _counted(states),
        "is_going_on": bool({"pending", "running"} & set(states)),
        "reasons": {q["why"] for q in completed} - {""},
        "completed": completed,
        "others": others,
        "cross": cross_of(folder),
        "together": together_of(folder),
    }


def _counted(states: list[str]) -> str:
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{len(states)} q_id{'s' if len(states) != 1 else ''}: {counts}"


def _of_index(folder: Path) -> dict[str, Any]:
    relations = []
    for relation in relations_of(folder):
        states, models = [], {}
        for artifacts_dir in _artifacts_dirs(relation):
            try:
                status = read_status(artifacts_dir)
                assert status is not None
                states.append(status.status)
                models[status.settings.model] = None
            except RelfvError:
                states.append("unreadable")
        page = page_path(relation)
        found = {"name": relation.resolve().name, "models": list(models), "counts": _counted(states)}
        relations.append({**found, "page": link(folder, page) if page.is_file() else ""})
    return {
        "title": folder.resolve().name,
        "version": __version__,
        "relations": relations,
        "together": together_of(folder),
    }
