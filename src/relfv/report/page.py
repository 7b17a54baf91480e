"""``report/index.html``: all q_ids of a relation on one page, from saved artifacts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

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
from relfv.store.files import require_no_links, sha256_file, write_atomic
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
    environment = Environment(
        loader=PackageLoader("relfv.report"), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    template = environment.get_template("page.html.j2")
    # What is written last must also have been read last, or one of two runs would leave out what the other did.
    path = page_path(folder)
    with sole_writer(path.parent):
        page = template.render(**_content(folder, artifacts_dirs))
        return write_atomic(path, page.encode())


def page_path(folder: Path) -> Path:
    """Where the page of ``folder`` is."""
    return folder / "report" / "index.html"


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
                completed.append(_completed(folder, status))
            else:
                others.append({"q_id": status.q_id, "status": status.status, "reason": status.reason or ""})
        except (RelfvError, KeyError, TypeError, ValueError, IndexError, AttributeError) as problem:
            others.append({"q_id": artifacts_dir.parent.name, "status": "unreadable", "reason": str(problem)})
    states = ["completed"] * len(completed) + [other["status"] for other in others]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return {
        "relation": folder.resolve().name,
        "version": __version__,
        "model": _model(settings.model, settings.precision, _opened_model(folder)),
        "notes": _opened_model(folder).get("notes", []),
        "is_demo": settings.model == "demo",
        "departures": settings.departures(),
        "counts": f"{len(states)} q_ids: {counts}",
        "completed": completed,
        "others": others,
        "cross": _cross(folder),
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
    """What the manifest says of the model; empty where there is none."""
    try:
        return read_json(folder / "run_manifest.json").get("model", {})
    except RelfvError:
        return {}


def _model(name: str, precision: str, opened: dict[str, Any]) -> dict[str, str]:
    shape = f"{opened['n_layers']} layers × {opened['n_heads']} heads" if opened else "shape not recorded"
    device = f"{opened['device']}, {opened['device_name']}" if opened else "a device not recorded"
    return {"name": name, "shape": shape, "precision": precision, "device": device}


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
