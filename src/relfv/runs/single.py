"""Run one stage at a time, as the spec's command lines do: the same stages as ``relfv run``.

Where a command writes into a q_id's folder, it keeps that folder's qid_status.json: it refuses settings that contradict
what is already there and inputs that are not the folder's own, records what it read and wrote, and, when the last layer
is in, completes the q_id. A command that writes elsewhere just writes its files.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from relfv.errors import InputError
from relfv.fingerprints import fingerprint_fields
from relfv.logs import logging_to, show
from relfv.models.context import TooLong
from relfv.models.sources import model_identity
from relfv.models.stored import resolved
from relfv.relations import csv_file, load_relations, require_q_ids, rows_sha256
from relfv.runs.qid import no_model, open_for, require_frozen_trials, run_step, run_steps, work_on
from relfv.runs.recorded import Overlay, noted, recorded, require_free, require_same, settings_within, settled_aloud
from relfv.settings import FLAGS, Settings
from relfv.stages import function_vector, heatmap, step6, zeroshot
from relfv.stages.cie import METRICS, heads_to_sweep
from relfv.stages.function_vector import FV
from relfv.stages.heatmap import HEATMAP
from relfv.stages.injection import require_layer
from relfv.stages.means import MEANS
from relfv.stages.noise_floor import NOISE_FLOOR
from relfv.stages.scores import AIE, CIE
from relfv.stages.stage import Work
from relfv.stages.table import STAGES, STEP_D, is_done, settings_of
from relfv.stages.trials import TRIALS, ineligible_reason
from relfv.stages.zeroshot import ZERO_SHOT_TRIALS
from relfv.store.files import require_folder, sha256_bytes
from relfv.store.folder import File, QidFolder
from relfv.store.status import QidStatus, read_status, read_status_of_results

log = logging.getLogger(__name__)


def run_step_d(settings: Settings, q_id: str, out_base_dir: Path) -> int:
    """Run StepD of one q_id into ``out_base_dir/artifacts``. An ineligible q_id is marked skipped: exit code 0."""
    settings = resolved(settings)
    csv_path = csv_file(settings.relation_csv_path)
    relations = load_relations(csv_path)
    require_q_ids([q_id], relations, "--relation_q_list", csv_path)
    require_folder(out_base_dir, "--out_base_dir")
    relation, folder = relations[q_id], QidFolder(out_base_dir / "artifacts", q_id)
    fields = fingerprint_fields(
        settings,
        rows_sha256=rows_sha256(relation, settings.corruption),
        model_identity=model_identity(settings.model, settings.revision),
    )
    _begun(folder, settings, fields)
    reason = ineligible_reason(relation, settings.n_demos, settings.corruption)
    model = None if reason else open_for(settings)
    if model:
        heads_to_sweep(model, settings)
    with folder.locked(), logging_to(folder.log):
        status = _begun(folder, settings, fields) or QidStatus(
            folder.artifacts, q_id, settings, fields, q_row_count=len(relation.pairs)
        )
        status.name = relation.name
        if model is None:
            log.info("%s skipped: %s", q_id, reason)
            status.set("pending")
            status.set("skipped", reason)
            show(status.path)
            return 0
        status.expected_layers = list(range(model.arch.n_layers))
        status.set("running")
        work = work_on(status, lambda: model, relation=relation, csv_sha256=sha256_bytes(csv_path.read_bytes()))
        try:
            with settled_aloud(status):
                run_steps(status, work, STEP_D)
        except TooLong:
            if not _said_to_be_skipped(status):
                raise
    show(folder.artifacts)
    return 0


def _begun(folder: QidFolder, settings: Settings, fields: Mapping[str, Any]) -> QidStatus | None:
    """The folder's status if it has results. Raises InputError if settings that StepD depends on differ from those of
    this experiment."""
    status = read_status_of_results(folder.artifacts)
    if status is None or not status.has_results():
        return None
    later = FLAGS.keys() - frozenset().union(*map(settings_of, STEP_D))
    require_same(status, {name: value for name, value in fields.items() if name not in later}, settings.model)
    return status


def run_heatmap(in_dir: Path, metric: str, topk: int, out_name: str | None) -> int:
    """Draw the heatmap of ``in_dir``'s scores. Under the q_id's own name it must be drawn as the q_id's settings
    say."""
    if out_name is not None and (Path(out_name).name != out_name or "\0" in out_name):
        raise InputError(f"--out_name {out_name!r}: expected a file name without a folder; it goes into --in_dir")
    status = read_status(in_dir)
    if _said_to_be_skipped(status):
        return 0
    q_id = status.q_id if status else in_dir.resolve().parent.name
    at: dict[File[Any], Path] = {HEATMAP: in_dir / out_name} if out_name else {}
    folder = QidFolder(in_dir, q_id, at)
    out = folder.path(HEATMAP)
    _require_files(folder.path(AIE))
    require_free("--out_name", out, HEATMAP, status)

    def overlay(base: Settings) -> Settings:
        return replace(base, score_key=metric, topk=topk)

    if status is None:
        run_step(_loose_work(folder, overlay(Settings(model=""))), heatmap.STAGE.step())
    elif out != QidFolder(in_dir, q_id).path(HEATMAP):
        # This is no stage, but files of a q_id's folder are only read under its lock, since they may be being written.
        with noted(folder, out):
            run_step(_loose_work(folder, overlay(status.settings)), heatmap.STAGE.step())
    else:
        with recorded(folder, overlay, [heatmap.STAGE], [AIE]) as status:
            run_step(work_on(status, no_model), heatmap.STAGE.step(), status)
    show(out)
    return 0


def run_step_e(stepd_artifacts_dir: Path, sampled_trials_path: Path, out_dir: Path, overlay: Overlay) -> int:
    """Make the top heads, the function vector and its quick check, then the zero-shot snapshot, in ``out_dir``."""
    status = read_status(out_dir) if out_dir.resolve() == stepd_artifacts_dir.resolve() else None
    if _said_to_be_skipped(status):
        return 0
    q_id = status.q_id if status else TRIALS.read(sampled_trials_path).questions[0].q_id
    source = QidFolder(stepd_artifacts_dir, q_id)
    at: dict[File[Any], Path] = {file: source.path(file) for file in (CIE, MEANS, NOISE_FLOOR, METRICS)}
    folder = QidFolder(out_dir, q_id, {**at, TRIALS: sampled_trials_path})
    _require_files(*map(folder.path, (CIE, MEANS, TRIALS)))
    stages = [function_vector.STAGE, zeroshot.STAGE]
    if status is None:
        work = _loose_work(folder, resolved(overlay(Settings())))
        for stage in stages:
            run_step(work, stage.step())
    else:
        settings = settings_within(status, overlay, stages)
        model = open_for(settings)
        with recorded(folder, overlay, stages, [TRIALS, CIE, MEANS]) as status:
            status.expected_layers = list(range(model.arch.n_layers))
            work = work_on(status, lambda: model)
            for stage in stages:
                run_step(work, stage.step(), status)
    show(folder.path(FV))
    return 0


def run_zero_shot(sampled_trials_path: Path, out_path: Path | None) -> int:
    """Make the zero-shot snapshot beside the frozen trials, or at ``out_path``."""
    _require_files(sampled_trials_path)
    home = sampled_trials_path.parent
    status = read_status(home)
    if _said_to_be_skipped(status):
        return 0
    out = out_path or home / ZERO_SHOT_TRIALS.name
    q_id = status.q_id if status else TRIALS.read(sampled_trials_path).questions[0].q_id
    folder = QidFolder(home, q_id, {TRIALS: sampled_trials_path, ZERO_SHOT_TRIALS: out})
    if out.resolve() == sampled_trials_path.resolve():
        raise InputError(f"--out_path {out}: is the file that is read; choose another name")
    require_free("--out_path", out, ZERO_SHOT_TRIALS, read_status(out.parent))
    if status is None:
        run_step(_loose_work(folder, Settings()), zeroshot.STAGE.step())
    elif out.resolve() != (home / ZERO_SHOT_TRIALS.name).resolve():
        require_frozen_trials(status)
        with noted(folder, out):
            run_step(_loose_work(folder, status.settings), zeroshot.STAGE.step())
    else:
        with recorded(folder, lambda base: base, [zeroshot.STAGE], [TRIALS]) as status:
            run_step(work_on(status, no_model), zeroshot.STAGE.step(), status)
    show(out)
    return 0


def run_step6(fv_path: Path, trials_path: Path, edit_layer: int, out_dir: Path, overlay: Overlay) -> int:
    """Run Step6 at one layer. After the last missing layer of a q_id's folder, run what follows Step6 and set
    ``completed``."""
    if re.fullmatch(r"layer_\d+", out_dir.name) and out_dir.name != f"layer_{edit_layer}":
        raise InputError(f"--out_dir ends in {out_dir.name}, --edit_layer is {edit_layer}; make them the same layer")
    if edit_layer < 0:
        raise InputError(f"--edit_layer {edit_layer}: layers are counted from 0")
    artifacts_dir = out_dir.parent.parent
    inside = out_dir.name == f"layer_{edit_layer}" and out_dir.parent.name == "step6"
    status = read_status(artifacts_dir) if inside else None
    if _said_to_be_skipped(status):
        return 0
    _require_files(fv_path, trials_path)
    _require_vector(fv_path)
    at: dict[File[Any], Path] = {FV: fv_path, ZERO_SHOT_TRIALS: trials_path}
    step = step6.STAGE.step(edit_layer)
    if status is None:
        at |= {file: out_dir / Path(file.name).name for file in step6.STAGE.writes}
        trials = ZERO_SHOT_TRIALS.read(trials_path)
        work = _loose_work(QidFolder(out_dir, trials.questions[0].q_id, at), resolved(overlay(Settings())))
        require_layer(work.model, edit_layer)
        run_step(work, step)
    else:
        settings = settings_within(status, overlay, [step6.STAGE])
        model = open_for(settings)
        require_layer(model, edit_layer)
        folder = QidFolder(artifacts_dir, status.q_id, at)
        with recorded(folder, overlay, [step6.STAGE], [FV, ZERO_SHOT_TRIALS]) as status:
            status.expected_layers = list(range(model.arch.n_layers))
            work = work_on(status, lambda: model)
            run_step(work, step, status)
            layers = [step6.STAGE.step(layer) for layer in status.expected_layers]
            if all(is_done(status, one) for one in layers):
                run_steps(status, work, STAGES[STAGES.index(step6.STAGE) + 1 :])
    show(out_dir)
    return 0


def _loose_work(folder: QidFolder, settings: Settings) -> Work:
    """The work in a folder without a status."""
    return Work(folder, settings, lambda: open_for(settings))


def _said_to_be_skipped(status: QidStatus | None) -> bool:
    """True, and logged, if StepD has skipped this q_id: there is nothing to do, and that is no failure."""
    if status is None or status.status != "skipped":
        return False
    log.info("%s skipped: %s", status.q_id, status.reason)
    return True


def _require_vector(path: Path) -> None:
    """Raise InputError for a vector that adds nothing, or whose length is too large for float32: models compute nothing
    but overflow with it."""
    with np.errstate(over="ignore"):
        length = np.linalg.norm(FV.read(path))
    if not 0 < length < np.inf:
        what = "holds zeros alone" if length == 0 else "is too long for float32"
        raise InputError(f"{path}: its vector {what}; expected a function vector as StepE writes it")


def _require_files(*paths: Path) -> None:
    """Raise InputError for input files that are not there, before a model is opened for nothing."""
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"no such file: {', '.join(missing)}; run the earlier stages first, or correct the path")
