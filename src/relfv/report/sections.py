"""What a relation's page shows of each completed q_id, made anew only when its files have changed.

Up to 200 q_ids all stand on one page. A page of 10,000 would have 200 MB, which no browser opens: then each has a page
of its own, ``report/q_ids/<q_id>.html``, which also keeps its row of the table for the next time the page is written.
"""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from relfv import __version__
from relfv.logs import printable
from relfv.report.content import of_qid, run_of
from relfv.report.registered_section import told_of_plan
from relfv.report.sealed_page import page_if_made_from, with_seal
from relfv.store.files import sha256_bytes, write_atomic
from relfv.store.status import QidStatus

MOST_ON_ONE_PAGE = 200
OWN_PAGES = "q_ids"
"""Their folder in ``report/``."""
_KEPT = re.compile(r'<template id="row" data-why="(.*?)">(.*?)</template>', re.DOTALL)


@cache
def environment() -> Environment:
    """The templates."""
    environment = Environment(
        loader=PackageLoader("relfv.report"), undefined=StrictUndefined, autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["percent"] = lambda share: f"{round(100 * share) + 0}%"
    environment.filters["visible"] = lambda token: printable(token.replace("\n", "⏎").replace(" ", "·"))
    return environment


def told(folder: Path, status: QidStatus) -> list[Any]:
    """What a page tells of a q_id depends on this, which has no times."""
    files = [record.files for record in status.stages.values()]
    where = [status.q_id, status.name, status.status, status.reason, status.q_row_count]
    return [*where, status.settings.to_json(), files, run_of(folder, status), told_of_plan(folder)]


def shown(folder: Path, status: QidStatus, at: str = "#") -> dict[str, Any]:
    """What the page of a relation's ``folder`` shows of a completed q_id: its ``row`` of the table, which leads to
    ``at``, and its ``section``, as they stand there, and ``why`` no share is shown. Raises an exception of any kind
    where its files are of another shape than relfv writes."""
    content = of_qid(folder, status)
    templates = environment()
    # Each on its own: what a template cannot show must not take the others with it. Both are escaped already.
    return {
        "why": content["share"]["why"],
        "row": Markup(templates.get_template("row.html.j2").render(q=content, at=at)),
        "section": Markup(templates.get_template("qid.html.j2").render(q=content)),
    }


_SHOWN: dict[Path, tuple[list[Any], dict[str, Any]]] = {}
"""By its status' path what was shown of a q_id, and of which state of its files."""


def shown_once(folder: Path, status: QidStatus) -> dict[str, Any]:
    """``shown``, made anew only where a file has changed: a run writes its page again and again."""
    files = [status.artifacts_dir / name for record in status.stages.values() for name in record.files]
    stats = [path.stat() if path.exists() else None for path in files]
    state = [told(folder, status), [stat and (stat.st_mtime_ns, stat.st_size, stat.st_ino) for stat in stats]]
    path = status.path.absolute()
    if path not in _SHOWN or _SHOWN[path][0] != state:
        _SHOWN[path] = state, shown(folder, status)
    return _SHOWN[path][1]


def shown_apart(folder: Path, status: QidStatus) -> dict[str, Any]:
    """``row`` and ``why`` of a q_id whose section has a page of its own, which is written where it is not up to date.
    Raises as ``shown`` does. Hold the lock of ``report/``."""
    path = folder / "report" / OWN_PAGES / f"{status.q_id}.html"
    origin = sha256_bytes(json.dumps([__version__, told(folder, status)]).encode())
    page = page_if_made_from(path, origin)
    if page is None:
        q = shown(folder, status, at=f"{OWN_PAGES}/{status.q_id}.html#")
        title = f"{folder.resolve().name}, {status.q_id}"
        page = environment().get_template("own.html.j2").render(title=title, version=__version__, q=q)
        write_atomic(path, with_seal(page, origin))
    kept = _KEPT.search(page)
    assert kept
    return {"why": kept[1], "row": Markup(kept[2])}
