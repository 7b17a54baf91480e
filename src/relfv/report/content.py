"""Content of the page about a relation's q_ids: read from saved artifacts, prepared for the templates."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote

from relfv.errors import RelfvError
from relfv.report.drawing import curve, heatmap
from relfv.report.known import Brief
from relfv.report.registered_section import plan_of_qid
from relfv.settings import FLAGS, Settings
from relfv.stages.ability import in_short as ability_in_short
from relfv.stages.ablation import ABLATION, SET_TO, beside_sufficiency
from relfv.stages.answers import ANSWERS
from relfv.stages.attribution import ATTRIBUTION
from relfv.stages.caveats import tells_apart
from relfv.stages.controls import CONTROLS_FILE
from relfv.stages.cross import CROSS, CROSS_FIGURE, cross_changes, read_cross
from relfv.stages.curve import CURVE
from relfv.stages.formats import FORMATS_FIGURE, FORMATS_FILE
from relfv.stages.function_vector import FV, STEP_E_EVAL, TOP_HEADS
from relfv.stages.heatmap import HEATMAP
from relfv.stages.mlps import MLP_CIE
from relfv.stages.new_queries import NEW_QUERIES
from relfv.stages.noise_floor import NOISE_FLOOR
from relfv.stages.positions import POSITIONS
from relfv.stages.replicates import REPLICATES
from relfv.stages.scores import AIE
from relfv.stages.step6 import EVAL_SUMMARY
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.stages.summary import SUMMARY
from relfv.stages.sweeps import KINDS, SWEEPS_FILE
from relfv.stages.trials import TRIALS
from relfv.stages.verdict import HELD_OUT, doubt, in_short
from relfv.store.files import read_bytes, sha256_file
from relfv.store.folder import File, QidFolder
from relfv.store.formats import read_json
from relfv.store.status import STATUS_FILE, QidStatus
from relfv.store.statuses import fields_of

_LINKED = (
    SUMMARY, TOP_HEADS, AIE, TRIALS, CONTROLS_FILE, ANSWERS, STEP6_SUMMARY, SWEEPS_FILE, NEW_QUERIES, ABLATION, MLP_CIE,
    REPLICATES, FORMATS_FILE, FORMATS_FIGURE, ATTRIBUTION, FV, HEATMAP, CURVE,
)  # fmt: skip
"""Files that the page links to."""


def of_qid(folder: Path, status: QidStatus, qid: QidFolder) -> dict[str, Any]:
    """Content of the section of a completed q_id, and where its files are. Raises an exception of any kind where they
    are of another shape than relfv writes."""

    def if_there(file: File[Any]) -> Any:
        """Read ``file``; None where it is missing, since folders of earlier versions lack some files."""
        return qid.read(file) if qid.has(file) else None

    trials, top, steps = qid.read(TRIALS), qid.read(TOP_HEADS), qid.read(STEP6_SUMMARY)
    heads = top["heads"]
    layers = {layer: qid.read(EVAL_SUMMARY, layer) for layer in steps["completed_layers"]}
    example, summary, controls = trials.questions[0].query, if_there(SUMMARY), if_there(CONTROLS_FILE)
    reference = qid.read(STEP_E_EVAL)["reference"]
    answers, ablation = if_there(ANSWERS), if_there(ABLATION)
    return {
        "q_id": status.q_id,
        "name": with_arrow(status.name),
        "rows": status.q_row_count,
        "plan": plan_of_qid(folder, status),
        "example_input": example.input,
        "example_output": example.output,
        "clean_prompt": trials.clean_prompts[0],
        "corrupted_prompt": trials.prompts[0],
        "n_trials": len(trials.questions),
        "n_queries": len(set(trials.clusters)),
        "collisions": len(trials.meta["first_token_collisions"]),
        "heads": heads,
        "detectable": top["meta"].get("detectable_mean_delta_p"),
        "n_distinguishable": sum(bool(head.get("distinguishable")) for head in heads),
        "noise_floor": if_there(NOISE_FLOOR),
        "verdict": summary and summary["verdict"],
        **_in_short(summary),
        "able": _able(summary),
        "enough": _enough(summary, ablation),
        "as_fed": answers and answers.get("first_trial_as_fed"),
        "share": _share(summary),
        "whole": answers and answers["summary"],
        "best_layer": steps["best_layer"],
        "n_layers": len(steps["expected_layers"]),
        "best": layers[steps["best_layer"]],
        "clean": reference["clean"],
        "answers": answers and _answers(answers, controls),
        "decoded": answers and answers["fv_decoded"],
        "sweeps": _sweeps(if_there(SWEEPS_FILE)),
        "new_queries": if_there(NEW_QUERIES),
        "mlps": if_there(MLP_CIE),
        "positions": if_there(POSITIONS),
        "ablation": _ablation(ablation),
        "replicates": if_there(REPLICATES),
        "formats": if_there(FORMATS_FILE),
        "attribution": if_there(ATTRIBUTION),
        "heatmap": heatmap(qid.read(AIE), status.settings.score_key, heads),
        "curve": curve(layers, reference, controls, steps["best_layer"]),
        "run": run_of(runs_in(folder), status.q_id, status.fingerprint_fields.get("model_identity")),
        "settings": _settings(status.settings),
        "identity": {
            name: status.fingerprint_fields.get(name) for name in ("model_identity", "rows_sha256", "algorithm_version")
        },
        "command": command_of(status),
        "files": [(file.named(status.q_id), link(folder, qid.path(file))) for file in _LINKED if qid.has(file)]
        + [(STATUS_FILE, link(folder, status.path))],
    }


def with_arrow(name: str) -> str:
    """``name`` with an arrow as one sign, which a line's end cannot break."""
    return name.replace("->", "→")


def _in_short(summary: dict[str, Any] | None) -> dict[str, str]:
    """The verdict in short, and why the effect is not shown to be the relation's own; empty for earlier versions."""
    known = summary if summary and "ability" in summary else None
    return {"short": in_short(known) if known else "", "doubt": doubt(known) if known else ""}


def _share(summary: dict[str, Any] | None) -> dict[str, Any]:
    """The held-out share of the gap and its interval; or why none is shown, as the id of a note on the page."""
    if not summary or "scored_token" not in summary:
        return {"why": "not-recorded"}
    if not tells_apart(summary):
        return {"why": "tokens-shared"}
    share = summary["share_of_gap"].get(HELD_OUT)
    if share:
        return {"why": "", **share}
    return {"why": "no-gap" if summary["p"]["clean"] <= summary["p"]["zero_shot"] else "gap-too-small"}


def _able(summary: dict[str, Any] | None) -> dict[str, Any] | None:
    """The model's ability to do the relation, in short, and results on the trials whose clean prompt it answers
    right."""
    if not summary or "ability" not in summary:
        return None
    able, of = summary["ability"], summary["answered_right"]
    rows = [("CIE of the top heads, mean", of["top_heads"])]
    rows.append((f"change in P with the vector at layer {summary['layer']}", of["step6"]))
    return {
        **able,
        "cannot": ability_in_short(able),
        "right": of,
        "rows": rows,
        "part": 0 < of["n_trials"] < able["n_trials"],
    }


def _enough(summary: dict[str, Any] | None, ablation: dict[str, Any] | None) -> list[Any]:
    """The table of what is sufficient and what is necessary; the latter is left out where it was not asked for."""
    if ablation:
        return ablation["table"]
    known = summary and "carriers" in summary and tells_apart(summary)
    return beside_sufficiency(summary, {}, {}) if summary and known else []


def _answers(answers: dict[str, Any], controls: dict[str, Any] | None) -> list[dict[str, Any]]:
    """One row for each prompt; with P at the layer of the answers where controls.json, of the same prompts, has it."""
    rows = answers["rows"]
    prompts = controls["by_prompt"] if controls else {"p_zero_shot": [], "p_fv": {}}
    before, after = prompts["p_zero_shot"], prompts["p_fv"].get(str(answers["layer"]), [])
    known = len(before) == len(after) == len(rows)
    return [{**row, "p": (before[i], after[i]) if known else None} for i, row in enumerate(rows)]


def _sweeps(sweeps: dict[str, Any] | None) -> dict[str, Any] | None:
    if sweeps is None:
        return None
    return {"caution": sweeps["caution"], "rows": [(kind, row) for kind in KINDS for row in sweeps.get(kind) or ()]}


def _ablation(ablation: dict[str, Any] | None) -> dict[str, Any] | None:
    """Results of the ablation: the table of sufficiency and necessity; what is lost without each set of heads; and, by
    direction, the single layer after which removing it loses most."""
    if ablation is None:
        return None
    by_layer = {
        name: min(of["per_layer"].items(), key=lambda item: item[1]["mean_p"] or 0.0)
        for name, of in ablation["directions"].items()
        if "per_layer" in of
    }
    return {**ablation, "lowest_layer": by_layer, "ways": [way for way in SET_TO if way in ablation["heads"]["top"]]}


def _settings(settings: Settings) -> list[tuple[str, str, bool]]:
    """Settings as (name, value, whether the spec has another value)."""
    departing = {words.split(" is ")[0] for words in settings.departures()}
    return [(name, _text(value), name in departing) for name, value in settings.to_json().items()]


def command_of(status: QidStatus) -> str:
    """The ``relfv run`` command that repeats a q_id in a new folder. Settings that are as the spec has them need no
    flag."""
    spec = Settings()
    flags = [f"--q_list={status.q_id}", "--out_root=repeated"]
    for name, flag in FLAGS.items():
        value = getattr(status.settings, name)
        if "run" in flag.commands and value != getattr(spec, name):
            on_or_off = {True: f"--{name}", False: f"--no-{name}"}
            flags.append(on_or_off[value] if isinstance(value, bool) else f"--{name}={_text(value)}")
    return shlex.join(["relfv", "run", *flags])


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


Run = tuple[frozenset[str], str, dict[str, Any]]
"""A run: its q_ids, the model's identity, and what the page shows of the run. It holds no times, so that a page made
after a killed run is the same page."""


def run_of(runs: Iterable[Run], q_id: str, identity: str | None) -> dict[str, Any]:
    """Description, for the page, of the first of ``runs`` that made a q_id with a model of this ``identity``."""
    for q_ids, made_with, described in runs:
        if q_id in q_ids and made_with == identity:
            return described
    return {"shape": "shape not recorded", "device": "a device not recorded", "notes": [], "facts": {}}


def runs_in(folder: Path) -> list[Run]:
    """The runs recorded in the manifest of ``folder``; empty if it cannot be read."""
    path = folder / "run_manifest.json"
    try:
        stat = path.stat()
        return _runs_at(path, (stat.st_ino, stat.st_mtime_ns, stat.st_size))
    except (OSError, RelfvError, KeyError, TypeError, AttributeError):
        return []


@lru_cache(maxsize=4)
def _runs_at(path: Path, _: tuple[int, ...]) -> list[Run]:
    """The runs in a manifest in this state: cached, so that it is read once, not for every q_id."""
    manifest, found = read_json(path), []
    for one in [manifest, *manifest.get("earlier_runs", [])]:
        if "model" in one:
            opened = one["model"]
            described = {
                "shape": f"{opened['n_layers']} layers × {opened['n_heads']} heads",
                "device": f"{opened['device']}, {opened['device_name']}",
                "notes": list(map(str, opened.get("notes", []))),
                "facts": {
                    "model class": opened.get("class"),
                    "family": opened.get("family"),
                    "engine": opened.get("engine"),
                    "relfv": one.get("relfv_version"),
                    **{name: version for name, version in one["versions"].items() if version},
                    "git commit": one.get("git_commit"),
                    "sha256 of the CSV": one.get("csv_sha256"),
                },
            }
            found.append((frozenset(one["q_list"]), one["model_identity"], described))
    return found


def models_of(briefs: Iterable[tuple[Brief, dict[str, Any]]]) -> list[dict[str, Any]]:
    """The models of a page, each with its q_ids: in one folder they may differ. Each comes with its ``run_of``."""
    models: dict[tuple[str, ...], dict[str, Any]] = {}
    for one, run in briefs:
        model = models.setdefault(
            (one.model, str(one.model_identity), one.precision),
            {**run, "name": one.model, "precision": one.precision, "q_ids": [], "departures": {}},
        )
        if run["facts"] and not model["facts"]:  # no manifest with a model has a q_id that is still to come
            model.update(run)
        model["q_ids"].append(one.q_id)
        model["departures"] |= dict.fromkeys(one.departures)
    return list(models.values())


def cross_of(folder: Path) -> dict[str, Any] | None:
    """The result of relfv cross; None where it did not run, or its files are not as it wrote them."""
    try:
        document = read_cross(folder)
    except RelfvError:
        return None
    figure = folder / CROSS_FIGURE
    if document["figure"].get(CROSS_FIGURE) != sha256_file(figure):
        return None
    return {
        "verdict": document["verdict"],
        "out_of_date": cross_changes(folder, document, fields_of(folder, document["q_ids"])),
        "picture": base64.b64encode(read_bytes(figure)).decode(),
        "figure": link(folder, figure),
        "file": link(folder, folder / CROSS),
    }


def link(folder: Path, path: Path) -> str:
    """Link to a file, relative to report/, so that the whole folder can be moved or copied."""
    return quote(f"../{path.relative_to(folder)}")
