"""``report/index.html``: all q_ids of a relation on one page, from saved artifacts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined

from relfv import __version__
from relfv.artifacts import QidPaths, read_trials
from relfv.errors import InputError
from relfv.manifest import MANIFEST
from relfv.report.table import find_statuses
from relfv.status import QidStatus, read_status
from relfv.storage import read_json, write_atomic

_HEADS_SHOWN = 5


def write_report(folder: Path) -> Path:
    """Write ``folder/report/index.html``. Raises InputError if ``folder`` holds no q_id."""
    statuses = [status for path in find_statuses(folder) if (status := read_status(path)) is not None]
    if not statuses:
        raise InputError(
            f"{folder}: no q_id here; expected a relation's results folder, e.g. results_fv/relation_qwise/relationA_ex"
        )
    environment = Environment(
        loader=PackageLoader("relfv.report"), undefined=StrictUndefined, autoescape=True, trim_blocks=True
    )
    page = environment.get_template("page.html.j2").render(**_content(folder, statuses))
    return write_atomic(folder / "report" / "index.html", page.encode())


def _content(folder: Path, statuses: list[QidStatus]) -> dict[str, Any]:
    completed = [status for status in statuses if status.status == "completed"]
    others = [status for status in statuses if status.status != "completed"]
    names = [*(s.status for s in statuses)]
    counts = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
    manifest = read_json(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    settings = statuses[0].settings if not completed else completed[0].settings
    return {
        "relation": folder.resolve().name,
        "version": __version__,
        "model": _model(settings.model, settings.precision, manifest.get("model", {})),
        "is_demo": settings.model == "demo",
        "departures": settings.departures(),
        "counts": f"{len(statuses)} q_ids: {counts}",
        "completed": [_completed(folder, status) for status in completed],
        "others": [{"q_id": s.q_id, "status": s.status, "reason": s.reason or ""} for s in others],
    }


def _model(name: str, precision: str, opened: dict[str, Any]) -> dict[str, str]:
    shape = f"{opened['n_layers']} layers × {opened['n_heads']} heads" if opened else "shape not recorded"
    device = f"{opened['device']}, {opened['device_name']}" if opened else "a device not recorded"
    return {"name": name, "shape": shape, "precision": precision, "device": device}


def _completed(folder: Path, status: QidStatus) -> dict[str, Any]:
    paths = QidPaths(status.artifacts_dir, status.q_id)
    trials = read_trials(paths.trials)
    summary = read_json(paths.step6_summary)
    heads = read_json(paths.top_heads)["heads"]
    layer = summary["per_layer"][str(summary["best_layer"])]
    query = trials.trials[0]["query"]
    return {
        "q_id": status.q_id,
        "rows": status.q_row_count,
        "example_input": query["input"],
        "example_output": query["output"],
        "n_trials": len(trials.trials),
        "n_queries": len({trial["query_source_index"] for trial in trials.trials}),
        "collisions": len(trials.meta["first_token_collisions"]),
        "best_head": heads[0],
        "top_heads": heads[:_HEADS_SHOWN],
        "n_top": len(heads),
        "clean_p": read_json(paths.step_e_eval)["reference"]["clean"]["mean_p"],
        "best_layer": summary["best_layer"],
        "best": read_json(paths.artifacts / layer["eval_summary_path"]),
        "heatmap": _link(folder, paths.heatmap),
        "curve": _link(folder, paths.curve),
    }


def _link(folder: Path, path: Path) -> str:
    """Relative to report/, so that the whole folder can be moved or copied."""
    return quote(f"../{path.relative_to(folder)}")
