"""``report/index.html``: all q_ids of a relation on one page, in one file, from saved artifacts alone; and an index
where a results folder holds several relations."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from relfv import __version__
from relfv.errors import InputError, RelfvError, in_words
from relfv.relations import called
from relfv.report.content import cross_of, link, models_of, runs_in, with_arrow
from relfv.report.known import Brief, Found, Known
from relfv.report.registered import PLAN
from relfv.report.registered_section import plan_section, told_of_plan
from relfv.report.sealed_page import page_if_made_from, sealed_from, with_seal
from relfv.report.sections import MOST_ON_ONE_PAGE, MadeFrom, environment, shown_apart, shown_once
from relfv.report.together import together_of
from relfv.stages.aggregate import AGGREGATE
from relfv.stages.cross import CROSS
from relfv.store.files import read_bytes, require_no_links, sha256_bytes, sha256_file, write_atomic
from relfv.store.locks import sole_writer
from relfv.store.statuses import find_statuses, has_q_ids, statuses_in

log = logging.getLogger(__name__)
_NO_QID = "no q_id here; expected a relation's results folder, e.g. results_fv/relation_qwise/relationA_ex"


def write_pages(folder: Path) -> Path:
    """Write the page of every relation at or below ``folder``, which may be a q_id's; an index where there are several.
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
    # A path "." has no parent in its text, so make it absolute first.
    of_a_qid = [folder.absolute().parent if path.parent == folder else path.parent.parent for path in found]
    return list(dict.fromkeys(of_a_qid))


def write_report(folder: Path, known: Known | None = None) -> Path:
    """Write ``folder/report/index.html``. A q_id whose files cannot be read is listed as such; it does not stop the
    page. An index above it is made again, too. ``known`` is what a run keeps of the folder.

    Raises InputError if ``folder`` holds no q_id, or its ``report`` is a link to elsewhere.
    """
    if not has_q_ids(folder):
        raise InputError(f"{folder}: {_NO_QID}")
    known = known or Known(folder)

    def of_relation() -> tuple[str, dict[str, Any]]:
        found = known.briefs()
        told = _told(folder, found)
        return _made_from(folder, told), _of_relation(known, found, told)

    path = _write(folder, "page.html.j2", of_relation)
    known.write()
    above = folder.absolute().parent
    if _has_index(above):
        write_index(above)
    return path


def _has_index(folder: Path) -> bool:
    """Whether ``folder`` has an index that relfv wrote: not a relation's page, and not somebody else's file."""
    try:
        return sealed_from(read_bytes(page_path(folder))) is not None and folder not in relations_of(folder)
    except OSError:
        return False


def write_index(folder: Path) -> Path:
    """Write ``folder/report/index.html``, which leads to the pages of the relations below ``folder``."""
    return _write(folder, "index.html.j2", lambda: (sha256_bytes(__version__.encode()), _of_index(folder)))


def _write(folder: Path, template: str, content: Callable[[], tuple[str, dict[str, Any]]]) -> Path:
    """Write a page of ``folder`` from ``template``. ``content`` gives a hash of what the page is made from, and the
    values that the template takes."""
    require_no_links(folder / "report", below=folder)
    path = page_path(folder)
    # Read inside the lock: the last to write must be the last to read, or it would leave out what another run did.
    with sole_writer(path.parent):
        origin, values = content()
        return write_atomic(path, with_seal(environment().get_template(template).render(**values), origin))


def page_path(folder: Path) -> Path:
    """The path of the page of ``folder``."""
    return folder / "report" / "index.html"


def page_problem(folder: Path) -> str | None:
    """Say what is wrong with the page of ``folder``; None for a page as it was written, of an earlier version, or
    none."""
    try:
        page = read_bytes(page_path(folder))
    except FileNotFoundError:
        return None
    except OSError as problem:
        return f"cannot be read ({problem.strerror})"
    if sealed_from(page) or page.endswith(b"</html>"):  # the end of pages of earlier versions, which have no seal
        return None
    return "is not as it was written; 'relfv report' or the next 'relfv run' makes it again"


def is_up_to_date(folder: Path, found: Found | None = None) -> bool:
    """Whether the page is whole, and made from the files that are now beside it: the q_ids that were ``found``
    there."""
    told = _told(folder, Known(folder).briefs() if found is None else found)
    return page_if_made_from(page_path(folder), _made_from(folder, told)) is not None


def _told(folder: Path, found: Found) -> dict[Path, Any]:
    """For each q_id, by its ``artifacts`` folder, the data that its part of the page is made from."""
    runs, plan = runs_in(folder), told_of_plan(folder)
    return {
        artifacts_dir: MadeFrom.of(one, runs, plan) if isinstance(one, Brief) else [artifacts_dir.parent.name, str(one)]
        for artifacts_dir, one in found.items()
    }


def _made_from(folder: Path, told: dict[Path, Any]) -> str:
    """Hash of everything the page tells, except times: a status that was only written again asks for no new page."""
    across = [sha256_file(folder / name) for name in (CROSS, AGGREGATE, PLAN)]
    return sha256_bytes(json.dumps([__version__, *across, *told.values()]).encode())


# --- what is on it ---------------------------------------------------------------------------------------------------


def _of_relation(known: Known, found: Found, told: dict[Path, Any]) -> dict[str, Any]:
    folder = known.folder
    completed: list[dict[str, Any]] = []
    others: list[dict[str, str]] = []
    readable = {artifacts_dir: one for artifacts_dir, one in found.items() if isinstance(one, Brief)}
    apart = len(found) > MOST_ON_ONE_PAGE  # by all, as workers count before they know how many will be completed
    for artifacts_dir, one in found.items():
        try:
            if isinstance(one, RelfvError):
                raise one
            if one.status == "completed":
                completed.append((shown_apart if apart else shown_once)(known, artifacts_dir, told[artifacts_dir]))
            else:
                named = called(one.q_id, with_arrow(one.name))
                others.append({"q_id": named, "status": one.status, "reason": one.reason or ""})
        except Exception as problem:  # whatever is wrong in one folder, the others are shown
            if not isinstance(problem, RelfvError):  # a RelfvError is reported by the q_id's own commands
                log.warning("%s cannot be shown on the page: %s", artifacts_dir.parent.name, in_words(problem))
            log.debug("traceback", exc_info=True)
            others.append({"q_id": artifacts_dir.parent.name, "status": "unreadable", "reason": in_words(problem)})
    states = ["completed"] * len(completed) + [other["status"] for other in others]
    return {
        "title": folder.resolve().name,
        "version": __version__,
        "models": models_of((one, told[artifacts_dir].run) for artifacts_dir, one in readable.items()),
        "counts": _counted(states),
        "is_going_on": bool({"pending", "running"} & set(states)),
        "plan": plan_section(folder, statuses_in(folder)) if (folder / PLAN).exists() else None,
        "reasons": {q["why"] for q in completed} - {""},
        "completed": completed,
        "apart": apart,
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
        for one in Known(relation).briefs().values():
            states.append(one.status if isinstance(one, Brief) else "unreadable")
            if isinstance(one, Brief):
                models[one.model] = None
        page = page_path(relation)
        found = {"name": relation.resolve().name, "models": list(models), "counts": _counted(states)}
        relations.append({**found, "page": link(folder, page) if page.is_file() else ""})
    return {
        "title": folder.resolve().name,
        "version": __version__,
        "relations": relations,
        "together": together_of(folder),
    }
