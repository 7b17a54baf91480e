"""``report/index.html``: all q_ids of a relation on one page, from saved artifacts alone."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, Template

from relfv import __version__
from relfv.errors import InputError, RelfvError
from relfv.report.table import find_statuses
from relfv.settings import Settings
from relfv.stages.cross import CROSS, CROSS_FIGURE, cross_changes, read_cross
from relfv.stages.curve import CURVE
from relfv.stages.function_vector import STEP_E_EVAL, TOP_HEADS
from relfv.stages.heatmap import HEATMAP
from relfv.stages.noise_floor import NOISE_FLOOR
from relfv.stages.step6 import EVAL_SUMMARY
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.stages.summary import SUMMARY
from relfv.stages.sweeps import SWEEPS_FILE
from relfv.stages.trials import TRIALS
from relfv.store.files import read_bytes, require_no_links, sha256_bytes, sha256_file, write_atomic
from relfv.store.folder import File, QidFolder
from relfv.store.formats import read_json
from relfv.store.locks import sole_writer
from relfv.store.status import QidStatus, fields_of, read_status

_HEADS_SHOWN = 5


def write_report(folder: Path) -> Path:
    """Write ``folder/report/index.html``. A q_id whose files cannot be read is listed as such; it does not stop the
    page.

    Raises InputError if ``folder`` holds no q_id, or its ``report`` is a link to elsewhere.
    """
    artifacts_dirs = find_statuses(folder)
    if not artifacts_dirs:
        raise InputError(
            f"{folder}: no q_id here; expected a relation's results folder, e.g. results_fv/relation_qwise/relationA_ex"
        )
    require_no_links(folder / "report", below=folder)
    # What is written last must also have been read last, or one of two runs would leave out what the other did.
    path = page_path(folder)
    with sole_writer(path.parent):
        made_from = _made_from(folder, artifacts_dirs)
        page = _template().render(**_content(folder, artifacts_dirs))
        return write_atomic(path, _with_seal(page, made_from))


@cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("relfv.report"), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    return environment.get_template("page.html.j2")


def page_path(folder: Path) -> Path:
    """Where the page of ``folder`` is."""
    return folder / "report" / "index.html"


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
    return _sealed_from(page) == _made_from(folder, find_statuses(folder))


def _with_seal(page: str, made_from: str) -> bytes:
    above = page.encode() + b"\n"
    return above + f"<!-- made from {made_from}, sha256 of what is above: {sha256_bytes(above)} -->\n".encode()


def _sealed_from(page: bytes) -> str | None:
    """What a page was made from, if it is as it was written."""
    above, _, last = page.removesuffix(b"\n").rpartition(b"\n")
    found = _SEAL.fullmatch(last + b"\n")
    return found[1].decode() if found and found[2].decode() == sha256_bytes(above + b"\n") else None


def _made_from(folder: Path, artifacts_dirs: list[Path]) -> str:
    """A hash of what the page tells of, but for times: a status that was only written again asks for no new page."""
    told: list[Any] = [__version__, sha256_file(folder / CROSS)]
    for artifacts_dir in artifacts_dirs:
        try:
            status = read_status(artifacts_dir)
            assert status is not None
            files = [record.files for record in status.stages.values()]
            where = [status.q_id, status.status, status.reason, status.q_row_count]
            told.append([*where, status.settings.to_json(), files])
        except RelfvError as problem:
            told.append([artifacts_dir.parent.name, str(problem)])
    return sha256_bytes(json.dumps(told).encode())


def shown(folder: Path, status: QidStatus) -> dict[str, Any]:
    """What the page of a relation's ``folder`` shows of a completed q_id. Raises an exception of any kind where its
    files are of another shape than relfv writes."""
    content = _completed(folder, status)
    # On a page of its own: what the template cannot show must not take the others with it.
    _template().render(**_frame(folder, with_cross=False), **_counted([content], [], status.settings))
    return content


def _content(folder: Path, artifacts_dirs: list[Path]) -> dict[str, Any]:
    completed: list[dict[str, Any]] = []
    others: list[dict[str, str]] = []
    settings = Settings()
    for artifacts_dir in artifacts_dirs:
        try:
            status = read_status(artifacts_dir)
            assert status is not None
            settings = status.settings
            if status.status == "completed":
                completed.append(shown(folder, status))
            else:
                others.append({"q_id": status.q_id, "status": status.status, "reason": status.reason or ""})
        except Exception as problem:
            said = str(problem) if isinstance(problem, RelfvError) else f"{type(problem).__name__}: {problem}"
            others.append({"q_id": artifacts_dir.parent.name, "status": "unreadable", "reason": said})
    return {**_frame(folder), **_counted(completed, others, settings)}


def _frame(folder: Path, *, with_cross: bool = True) -> dict[str, Any]:
    """What the page says of the relation as a whole."""
    return {
        "relation": folder.resolve().name,
        "version": __version__,
        "opened": _opened_model(folder),
        "cross": _cross(folder) if with_cross else None,
    }


def _counted(completed: list[dict[str, Any]], others: list[dict[str, str]], settings: Settings) -> dict[str, Any]:
    """What it says of the q_ids; ``settings`` are those of the last of them."""
    states = ["completed"] * len(completed) + [other["status"] for other in others]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return {
        "model": {"name": settings.model, "precision": settings.precision},
        "is_demo": settings.model == "demo",
        "departures": settings.departures(),
        "counts": f"{len(states)} q_ids: {counts}",
        "completed": completed,
        "others": others,
    }


def _cross(folder: Path) -> dict[str, Any] | None:
    """The result of relfv cross; None where it did not run, or its files are not as it wrote them."""
    try:
        document = read_cross(folder)
    except RelfvError:
        return None
    if document["figure"].get(CROSS_FIGURE) != sha256_file(folder / CROSS_FIGURE):
        return None
    return {
        "verdict": document["verdict"],
        "out_of_date": cross_changes(folder, document, fields_of(folder, document["q_ids"])),
        "figure": _link(folder, folder / CROSS_FIGURE),
        "file": _link(folder, folder / CROSS),
    }


def _opened_model(folder: Path) -> dict[str, Any]:
    """What the manifest says of the model's shape, device and peculiarities, as far as it can be read."""
    try:
        opened = read_json(folder / "run_manifest.json")["model"]
        shape = f"{opened['n_layers']} layers × {opened['n_heads']} heads"
        device, notes = f"{opened['device']}, {opened['device_name']}", list(map(str, opened.get("notes", [])))
        return {"shape": shape, "device": device, "notes": notes}
    except (RelfvError, KeyError, TypeError):
        return {"shape": "shape not recorded", "device": "a device not recorded", "notes": []}


def _completed(folder: Path, status: QidStatus) -> dict[str, Any]:
    qid = QidFolder(status.artifacts_dir, status.q_id)

    def if_there(file: File[Any]) -> Any:
        """Folders of earlier versions lack some files."""
        return qid.read(file) if qid.has(file) else None

    trials, heads, best_layer = qid.read(TRIALS), qid.read(TOP_HEADS)["heads"], qid.read(STEP6_SUMMARY)["best_layer"]
    example, summary = trials.questions[0].query, if_there(SUMMARY)
    return {
        "q_id": status.q_id,
        "rows": status.q_row_count,
        "example_input": example.input,
        "example_output": example.output,
        "n_trials": len(trials.questions),
        "n_queries": len(set(trials.clusters)),
        "collisions": len(trials.meta["first_token_collisions"]),
        "best_head": heads[0],
        "top_heads": heads[:_HEADS_SHOWN],
        "n_top": len(heads),
        "clean_p": qid.read(STEP_E_EVAL)["reference"]["clean"]["mean_p"],
        "noise_floor": if_there(NOISE_FLOOR),
        "verdict": summary and summary["verdict"],
        "sweeps": if_there(SWEEPS_FILE),
        "best_layer": best_layer,
        "best": qid.read(EVAL_SUMMARY, best_layer),
        "heatmap": _link(folder, qid.path(HEATMAP)),
        "curve": _link(folder, qid.path(CURVE)),
    }


def _link(folder: Path, path: Path) -> str:
    """Relative to report/, so that the whole folder can be moved or copied."""
    return quote(f"../{path.relative_to(folder)}")
