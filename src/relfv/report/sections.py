"""Sections of a relation's page, one for each completed q_id, made anew only when its files have changed.

Up to 200 q_ids all stand on one page. A page of 10,000 would have 200 MB, which no browser opens: then each has a page
of its own, ``report/q_ids/<q_id>.html``, which also keeps its row of the table for the next time the page is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from relfv import __version__
from relfv.logs import printable
from relfv.report.content import Run, of_qid, run_of, runs_in
from relfv.report.known import Brief, Known
from relfv.report.registered_section import told_of_plan
from relfv.report.sealed_page import page_if_made_from, with_seal
from relfv.store.files import sha256_bytes, write_atomic
from relfv.store.folder import QidFolder
from relfv.store.index import state_of
from relfv.store.status import QidStatus
from relfv.words import percent

MOST_ON_ONE_PAGE = 200
OWN_PAGES = "q_ids"
"""Name of the folder in ``report/`` that holds the q_ids' own pages."""
_KEPT = re.compile(r'<template id="row" data-why="(.*?)">(.*?)</template>', re.DOTALL)


@cache
def environment() -> Environment:
    """The templates' environment."""
    environment = Environment(
        loader=PackageLoader("relfv.report"), undefined=StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["number"] = lambda value: "–" if value is None else f"{value:.2f}"
    environment.filters["signed"] = lambda value: "–" if value is None else f"{value:+.2f}"
    environment.filters["percent"] = percent
    environment.filters["visible"] = lambda token: printable(token.replace("\n", "⏎").replace(" ", "·"))
    return environment


class MadeFrom(NamedTuple):
    """The data, none of it times, on which a page's part about one q_id depends."""

    told: str
    """Hash ``told`` of the q_id's ``Brief``."""
    run: dict[str, Any]
    """Description of its run; see ``run_of``."""
    plan: str
    """Text about the registered plan; see ``told_of_plan``."""

    @staticmethod
    def of(brief: Brief, runs: Iterable[Run], plan: str) -> MadeFrom:
        """Collect the data for one q_id; ``runs`` and ``plan`` are its folder's."""
        return MadeFrom(brief.told, run_of(runs, brief.q_id, brief.model_identity), plan)


def shown(folder: Path, status: QidStatus, qid: QidFolder, at: str = "#") -> dict[str, Any]:
    """Render a completed q_id for the page of a relation's ``folder``: its ``row`` of the table, which links to ``at``,
    its ``section``, both as HTML, and ``why`` no share is shown. Raises an exception of any kind where its files are of
    another shape than relfv writes."""
    content = of_qid(folder, status, qid)
    templates = environment()
    # Render each q_id on its own: one that a template cannot show must not stop the others. Both are escaped already.
    return {
        "why": content["share"]["why"],
        "row": Markup(templates.get_template("row.html.j2").render(q=content, at=at)),
        "section": Markup(templates.get_template("qid.html.j2").render(q=content)),
    }


def shown_once(known: Known, artifacts_dir: Path, origin: MadeFrom) -> dict[str, Any]:
    """``shown``, made anew only where a file has changed: a run writes its page again and again."""
    kept = known.sections.get(artifacts_dir)
    if kept is None or kept[0] != origin or kept[1] != state_of(kept[2]):
        status, qid = known.opened(artifacts_dir)
        files = [f"{artifacts_dir}/{name}" for record in status.stages.values() for name in record.files]
        kept = known.sections[artifacts_dir] = origin, state_of(files), files, shown(known.folder, status, qid)
    return kept[3]


def shown_apart(known: Known, artifacts_dir: Path, origin: MadeFrom) -> dict[str, Any]:
    """``row`` and ``why`` of a q_id whose section has a page of its own; that page is written where it is not up to
    date. Raises as ``shown`` does."""
    own = _own_page(known.folder, artifacts_dir)
    state, was_there = state_of([str(own)], _digest(origin)), own.is_file()
    make = partial(_kept_in_own_page, known, artifacts_dir, origin)
    # A page that was written just now is read once, the next time: only then is it known to be whole.
    why, row = known.pages.of(artifacts_dir.parent.name, state, make, lambda _: was_there)
    return {"why": why, "row": Markup(row)}


def write_own_page(folder: Path, artifacts_dir: Path) -> None:
    """Write the page of one of very many q_ids, in the process that has just finished it. Raises as ``shown`` does."""
    known = Known(folder)
    status, _ = known.opened(artifacts_dir)
    _kept_in_own_page(known, artifacts_dir, MadeFrom.of(Brief.of(status), runs_in(folder), told_of_plan(folder)))


def _own_page(folder: Path, artifacts_dir: Path) -> Path:
    return folder / "report" / OWN_PAGES / f"{artifacts_dir.parent.name}.html"


def _digest(origin: MadeFrom) -> str:
    return sha256_bytes(json.dumps([__version__, *origin]).encode())


def _kept_in_own_page(known: Known, artifacts_dir: Path, origin: MadeFrom) -> tuple[str, ...]:
    path, q_id, digest = _own_page(known.folder, artifacts_dir), artifacts_dir.parent.name, _digest(origin)
    page = page_if_made_from(path, digest)
    if page is None:
        q = shown(known.folder, *known.opened(artifacts_dir), at=f"{OWN_PAGES}/{q_id}.html#")
        title = f"{known.folder.resolve().name}, {q_id}"
        page = environment().get_template("own.html.j2").render(title=title, version=__version__, q=q)
        write_atomic(path, with_seal(page, digest))
    kept = _KEPT.search(page)
    assert kept
    return kept.groups()
