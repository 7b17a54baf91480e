"""One stage at a time, as the spec's command lines call it, on the same stage functions as ``relfv run``.

Where a command works inside a q_id's folder, it keeps that folder's qid_status.json: it refuses settings that
contradict what is already there, records its files, and, when the last layer is in, completes the q_id. A command
whose paths point elsewhere just writes its files.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from relfv.artifacts import QidPaths, read_trials
from relfv.config import Settings, fingerprint_fields
from relfv.engine.language_model import LanguageModel
from relfv.errors import InputError
from relfv.logs import logging_to
from relfv.models.loading import model_identity
from relfv.pipeline import (
    STEP_D,
    QidPipeline,
    Stage,
    is_complete,
    open_for,
    require_frozen_trials,
    run_recorded,
    stage_names,
    step6_stage,
)
from relfv.relations import file_sha256, load_relations, rows_sha256
from relfv.stages.injection import require_layer
from relfv.stages.trials import ineligible_reason
from relfv.status import QidStatus, read_status
from relfv.steps import Step6, heads_to_sweep, step6_summary, step_curve, step_e, step_heatmap, step_zero_shot
from relfv.storage import lock

log = logging.getLogger(__name__)

Overlay = Callable[[Settings], Settings]
"""The settings of a command: its own flags over a base."""

_FIRST_USED_BY = {"topk": "heatmap", "alpha": "stepE", "n_eval": "step6", "allow_query_duplicates": "step6"}
"""Settings that StepD does not depend on, and the first stage that does: until then they may still be chosen."""


def run_step_d(settings: Settings, q_id: str, out_base_dir: Path) -> int:
    """StepD of one q_id into ``out_base_dir/artifacts``. An ineligible q_id is marked skipped: exit code 0."""
    csv_path = Path(settings.relation_csv_path)
    relations = load_relations(csv_path)
    if q_id not in relations:
        raise InputError(f"--relation_q_list: {q_id} not in {csv_path}, which has {', '.join(relations)}")
    relation = relations[q_id]
    paths = QidPaths(out_base_dir / "artifacts", q_id)
    fields = fingerprint_fields(
        settings, rows_sha256=rows_sha256(relation), model_identity=model_identity(settings.model)
    )
    status = read_status(paths.artifacts)
    if status is None or not status.has_results():
        status = QidStatus(paths.artifacts, q_id, settings, fields, q_row_count=len(relation.pairs))
    with _working_in(status):
        _require_same(status, {name: value for name, value in fields.items() if name not in _FIRST_USED_BY})
        if reason := ineligible_reason(relation, settings.n_demos):
            log.info("%s skipped: %s", q_id, reason)
            status.set("skipped", reason)
            print(status.path)
            return 0
        model = open_for(settings)
        heads_to_sweep(model, settings)
        status.expected_layers = list(range(model.arch.n_layers))
        status.set("running")
        with _settling(status):
            QidPipeline(status, relation, file_sha256(csv_path), lambda: model).run_stages(STEP_D)
    print(paths.artifacts)
    return 0


def run_heatmap(in_dir: Path, metric: str, topk: int, out_name: str | None) -> int:
    """The heatmap of ``in_dir``'s scores. Under the q_id's own name it must be drawn as the q_id's settings say."""
    if out_name is not None and Path(out_name).name != out_name:
        raise InputError(f"--out_name {out_name!r}: expected a file name without a folder; it goes into --in_dir")
    status = read_status(in_dir)
    if _said_to_be_skipped(status):
        return 0
    paths = QidPaths(in_dir, status.q_id if status else in_dir.resolve().parent.name)
    out = in_dir / out_name if out_name else paths.heatmap
    if out != paths.heatmap:
        status = None
    _settings_within(status, lambda base: replace(base, score_key=metric, topk=topk), stage="heatmap")
    with _working_in(status), _settling(status):
        run_recorded(status, Stage("heatmap", lambda: step_heatmap(paths, metric, topk, out)))
    print(out)
    return 0


def run_step_e(stepd_artifacts_dir: Path, sampled_trials_path: Path, out_dir: Path, overlay: Overlay) -> int:
    """Top heads, function vector and its quick check, then the zero-shot snapshot, into ``out_dir``."""
    status = read_status(out_dir) if _same(out_dir, stepd_artifacts_dir) else None
    if _said_to_be_skipped(status):
        return 0
    q_id = status.q_id if status else read_trials(sampled_trials_path).trials[0]["q_id"]
    source, out = QidPaths(stepd_artifacts_dir, q_id), QidPaths(out_dir, q_id)
    _require_files(source.cie, source.means, sampled_trials_path)
    settings = _settings_within(status, overlay, stage="stepE")
    model = _open(settings, status)
    with _working_in(status), _settling(status):
        run_recorded(status, Stage("stepE", lambda: step_e(model, settings, source, sampled_trials_path, out)))
        run_recorded(status, Stage("zeroshot", lambda: step_zero_shot(sampled_trials_path, out.zero_shot_trials)))
    print(out.fv)
    return 0


def run_zero_shot(sampled_trials_path: Path, out_path: Path | None) -> int:
    """The zero-shot snapshot beside the frozen trials, or at ``out_path``."""
    out = out_path or sampled_trials_path.with_name("sampled_trials_zeroshot.json")
    origin = read_status(sampled_trials_path.parent)
    if _said_to_be_skipped(origin):
        return 0
    if origin:
        require_frozen_trials(origin)
    status = origin if _same(out.parent, sampled_trials_path.parent) else None
    with _working_in(status), _settling(status):
        run_recorded(status, Stage("zeroshot", lambda: step_zero_shot(sampled_trials_path, out)))
    print(out)
    return 0


def run_step6(fv_path: Path, trials_path: Path, edit_layer: int, out_dir: Path, overlay: Overlay) -> int:
    """Step6 at one layer. After the last missing layer of a q_id's folder: summary, curve, and ``completed``."""
    artifacts_dir = out_dir.parent.parent
    inside = out_dir.name == f"layer_{edit_layer}" and out_dir.parent.name == "step6"
    if re.fullmatch(r"layer_\d+", out_dir.name) and out_dir.name != f"layer_{edit_layer}":
        raise InputError(f"--out_dir ends in {out_dir.name}, --edit_layer is {edit_layer}; one of them is a slip")
    status = read_status(artifacts_dir) if inside else None
    if _said_to_be_skipped(status):
        return 0
    _require_files(fv_path, trials_path)
    settings = _settings_within(status, overlay, stage=step6_stage(edit_layer))
    model = _open(settings, status)
    require_layer(model, edit_layer)
    with _working_in(status), _settling(status):
        step6 = Step6(model, settings, fv_path, trials_path)
        run_recorded(status, Stage(step6_stage(edit_layer), lambda: step6.run(edit_layer, out_dir)))
        if inside:
            q_id = status.q_id if status else read_trials(trials_path).trials[0]["q_id"]
            _summarize_when_whole(status, QidPaths(artifacts_dir, q_id), settings, model)
    print(out_dir)
    return 0


def _summarize_when_whole(status: QidStatus | None, paths: QidPaths, settings: Settings, model: LanguageModel) -> None:
    layers = list(range(model.arch.n_layers))
    if all((paths.step6_layer(layer) / "eval_summary.json").exists() for layer in layers):
        run_recorded(status, Stage("step6_summary", lambda: step6_summary(paths, settings.score_key, layers)))
        run_recorded(status, Stage("injection_curve", lambda: step_curve(paths)))


def _settings_within(status: QidStatus | None, overlay: Overlay, *, stage: str) -> Settings:
    """The command's flags over the folder's own settings. A flag may differ from what the folder says only if no stage
    that depends on it has been done, besides ``stage`` itself, which is about to be. Raises InputError."""
    if status is None:
        return overlay(Settings())
    settings = overlay(status.settings)
    wanted = {name: value for name, value in settings.to_json().items() if name in status.fingerprint_fields}
    done = [name for name in status.stages if name != stage]
    free = {field for field, first in _FIRST_USED_BY.items() if not any(_from(first, name) for name in done)}
    _require_same(status, {name: value for name, value in wanted.items() if name not in free})
    # Where the model lies and what runs it is this command's affair; the files keep the name they began with.
    own = {name: getattr(status.settings, name) for name in ("model", "device", "relation_csv_path")}
    status.settings = replace(settings, **own)
    status.fingerprint_fields |= {name: wanted[name] for name in free}
    return settings


def _from(first: str, stage: str) -> bool:
    """True if ``stage`` is the stage ``first`` or a later one, in the order of the spec."""
    order = ["heatmap", "stepE", "zeroshot", "step6"]
    group = "step6" if stage.startswith("step6") or stage == "injection_curve" else stage
    return group in order and order.index(group) >= order.index(first)


def _said_to_be_skipped(status: QidStatus | None) -> bool:
    """True, and said, if StepD has skipped this q_id: there is nothing to do, and that is no failure."""
    if status is None or status.status != "skipped":
        return False
    log.info("%s skipped: %s", status.q_id, status.reason)
    return True


def _require_files(*paths: Path) -> None:
    """Raise InputError for input files that are not there, before a model is opened for nothing."""
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise InputError(f"no such file: {', '.join(missing)}; run the earlier stages first, or mend the path")


def _open(settings: Settings, status: QidStatus | None) -> LanguageModel:
    """The model of a command. Raises InputError if a folder's other results come from another one."""
    if status is None:
        return open_for(settings)
    _require_same(status, {"model_identity": model_identity(settings.model)})
    model = open_for(settings)
    status.expected_layers = list(range(model.arch.n_layers))
    return replace(model, name=status.settings.model)


def _require_same(status: QidStatus, wanted: dict[str, Any]) -> None:
    there = status.fingerprint_fields
    differences = [
        f"{name} is {there.get(name)!r} there, {value!r} here"
        for name, value in wanted.items()
        if there.get(name) != value
    ]
    if differences:
        raise InputError(
            f"{status.artifacts_dir} holds results of another experiment: {', '.join(differences)}; use another output "
            "folder, or move this one aside"
        )


@contextmanager
def _settling(status: QidStatus | None) -> Iterator[None]:
    """Afterwards say where the q_id stands: completed if all is there and intact, else pending with what comes next,
    or failed with the reason."""
    if status is None:
        yield
        return
    try:
        yield
    except Exception as problem:
        status.set("failed", str(problem))
        raise
    if is_complete(status):
        status.set("completed")
        log.info("%s completed", status.q_id)
    else:
        missing = [name for name in stage_names(status.expected_layers) if not status.intact(name)]
        status.set("pending", f"next stage: {missing[0]}")


@contextmanager
def _working_in(status: QidStatus | None) -> Iterator[None]:
    """For work inside a q_id's folder: hold its lock, the same one as ``relfv run``, and log into it.

    Raises InputError if another process holds the lock, RunError if the frozen trials were changed.
    """
    if status is None:
        yield
        return
    base = status.artifacts_dir.resolve().parent
    with lock(base.parent / ".locks" / f"{base.name}.lock") as holder:
        if holder:
            raise InputError(f"{base} is being written by {holder}; wait for it, or use another folder")
        require_frozen_trials(status)
        with logging_to(QidPaths(status.artifacts_dir, status.q_id).log):
            yield


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
