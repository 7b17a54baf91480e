"""One stage at a time, as the spec's command lines call it, on the same stage functions as ``relfv run``.

Where a command writes into a q_id's folder, it keeps that folder's qid_status.json: it refuses settings that contradict
what is already there and inputs that are not the folder's own, records what it read and wrote, and, when the last layer
is in, completes the q_id. A command that writes elsewhere just writes its files.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from relfv.errors import InputError, RunError
from relfv.language_model import LanguageModel
from relfv.logs import logging_to
from relfv.models.sources import model_identity
from relfv.relations import file_sha256, load_relations, require_q_ids, rows_sha256
from relfv.runs.qid import (
    QidPipeline,
    Stage,
    after_step6,
    is_complete,
    open_for,
    require_frozen_trials,
    run_recorded,
)
from relfv.settings import Settings, fingerprint_fields
from relfv.stages.injection import require_layer
from relfv.stages.trials import ineligible_reason
from relfv.steps import (
    StageResult,
    Step6,
    clean_trials,
    heads_to_sweep,
    step_e,
    step_heatmap,
    step_zero_shot,
)
from relfv.store.artifacts import QidPaths, read_trials
from relfv.store.files import lock, remove_temporaries, require_folder, require_no_links
from relfv.store.status import AFTER_STEP6, STEP_D, QidStatus, read_status, read_status_of_results, step6_stage

log = logging.getLogger(__name__)

Overlay = Callable[[Settings], Settings]
"""The settings of a command: its own flags over a base."""

_WAIT_S = 60.0

_FIRST_USED_BY = {"topk": "heatmap", "alpha": "stepE", "n_eval": "step6", "allow_query_duplicates": "step6"}
"""Settings that StepD does not depend on, and the first stage that does: until then they may still be chosen."""


def run_step_d(settings: Settings, q_id: str, out_base_dir: Path) -> int:
    """StepD of one q_id into ``out_base_dir/artifacts``. An ineligible q_id is marked skipped: exit code 0."""
    csv_path = Path(settings.relation_csv_path)
    relations = load_relations(csv_path)
    require_q_ids([q_id], relations, "--relation_q_list", csv_path)
    require_folder(out_base_dir, "--out_base_dir")
    relation = relations[q_id]
    paths = QidPaths(out_base_dir / "artifacts", q_id)
    fields = fingerprint_fields(
        settings, rows_sha256=rows_sha256(relation), model_identity=model_identity(settings.model)
    )

    def begun() -> QidStatus:
        """The folder's status if it has results, which must be of this experiment; else a new one."""
        found = read_status_of_results(paths.artifacts)
        if found is None or not found.has_results():
            return QidStatus(paths.artifacts, q_id, settings, fields, q_row_count=len(relation.pairs))
        _require_same(found, {name: value for name, value in fields.items() if name not in _FIRST_USED_BY})
        return found

    begun()
    reason = ineligible_reason(relation, settings.n_demos)
    model = None if reason else open_for(settings)
    if model:
        heads_to_sweep(model, settings)
    with _working_in(paths):
        status = begun()
        if model is None:
            log.info("%s skipped: %s", q_id, reason)
            status.set("skipped", reason)
            print(status.path)
            return 0
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
    _require_files(paths.aie)
    out = in_dir / out_name if out_name else paths.heatmap

    def draw() -> StageResult:
        return step_heatmap(paths, metric, topk, out)

    # Under another name it is no stage, but what is being written in a q_id's folder is only safe under its lock.
    with _working_in(paths) if status else nullcontext():
        if status is None or out != paths.heatmap:
            run_recorded(None, Stage("heatmap", draw))
        else:
            status = _adopted(paths, lambda base: replace(base, score_key=metric, topk=topk), "heatmap", [paths.aie])
            with _settling(status):
                run_recorded(status, Stage("heatmap", draw))
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

    def vector() -> StageResult:
        per_pass = status.trials_per_pass if status else {}
        clean = clean_trials(model, sampled_trials_path)
        return step_e(model, settings, source, sampled_trials_path, clean, out, per_pass)

    def zero_shot() -> StageResult:
        return step_zero_shot(sampled_trials_path, out.zero_shot_trials)

    stages = [Stage("stepE", vector), Stage("zeroshot", zero_shot)]
    if status is None:
        for stage in stages:
            run_recorded(None, stage)
    else:
        with _working_in(out):
            status = _adopted(out, overlay, "stepE", [sampled_trials_path, source.cie, source.means], model)
            with _settling(status):
                for stage in stages:
                    run_recorded(status, stage)
    print(out.fv)
    return 0


def run_zero_shot(sampled_trials_path: Path, out_path: Path | None) -> int:
    """The zero-shot snapshot beside the frozen trials, or at ``out_path``."""
    _require_files(sampled_trials_path)
    out = out_path or sampled_trials_path.with_name("sampled_trials_zeroshot.json")
    status = read_status(sampled_trials_path.parent)
    if _said_to_be_skipped(status):
        return 0
    stage = Stage("zeroshot", lambda: step_zero_shot(sampled_trials_path, out))
    if status:
        require_frozen_trials(status)
    paths = QidPaths(status.artifacts_dir, status.q_id) if status else None
    with _working_in(paths) if paths else nullcontext():
        if paths is None or not _same(out, paths.zero_shot_trials):
            run_recorded(None, stage)
        else:
            status = _adopted(paths, lambda base: base, "zeroshot", [sampled_trials_path])
            with _settling(status):
                run_recorded(status, stage)
    print(out)
    return 0


def run_step6(fv_path: Path, trials_path: Path, edit_layer: int, out_dir: Path, overlay: Overlay) -> int:
    """Step6 at one layer. After the last missing layer of a q_id's folder: summaries, curve, controls, and ``completed``."""
    if re.fullmatch(r"layer_\d+", out_dir.name) and out_dir.name != f"layer_{edit_layer}":
        raise InputError(f"--out_dir ends in {out_dir.name}, --edit_layer is {edit_layer}; one of them is a slip")
    artifacts_dir = out_dir.parent.parent
    inside = out_dir.name == f"layer_{edit_layer}" and out_dir.parent.name == "step6"
    status = read_status(artifacts_dir) if inside else None
    if _said_to_be_skipped(status):
        return 0
    _require_files(fv_path, trials_path)
    settings = _settings_within(status, overlay, stage=step6_stage(edit_layer))
    model = _open(settings, status)
    require_layer(model, edit_layer)
    step6 = Step6(model, settings, fv_path, trials_path)

    def inject() -> StageResult:
        return step6.run(edit_layer, out_dir, status.trials_per_pass.get("step6") if status else None)

    stage = Stage(step6_stage(edit_layer), inject)
    if status is None:
        run_recorded(None, stage)
    else:
        paths = QidPaths(artifacts_dir, status.q_id)
        with _working_in(paths):
            status = _adopted(paths, overlay, stage.name, [fv_path, trials_path], model)
            with _settling(status):
                run_recorded(status, stage)
                _conclude_when_whole(status, paths, model)
    print(out_dir)
    return 0


def _conclude_when_whole(status: QidStatus, paths: QidPaths, model: LanguageModel) -> None:
    if all(status.intact(step6_stage(layer)) for layer in status.expected_layers):
        bodies = after_step6(status, paths, lambda: model, lambda: clean_trials(model, paths.trials))
        for name, run in bodies.items():
            run_recorded(status, Stage(name, run))


def _settings_within(status: QidStatus | None, overlay: Overlay, *, stage: str) -> Settings:
    """The command's flags over the folder's own settings. A flag may differ from what the folder says only if no stage
    that depends on it has been done, besides ``stage`` itself, which is about to be. Raises InputError."""
    if status is None:
        return overlay(Settings())
    settings = overlay(status.settings)
    free = _free_fields(status, stage)
    wanted = {name: value for name, value in settings.to_json().items() if name in status.fingerprint_fields}
    _require_same(status, {name: value for name, value in wanted.items() if name not in free})
    return settings


def _adopted(
    paths: QidPaths, overlay: Overlay, stage: str, inputs: Sequence[Path], model: LanguageModel | None = None
) -> QidStatus:
    """The folder's status as it is now, under the lock, with the command's settings taken into it.

    Raises InputError if settings or inputs are not the folder's own, RunError if the frozen trials were changed.
    """
    status = read_status(paths.artifacts)
    if status is None:
        raise RunError(f"{paths.artifacts}: its qid_status.json is gone; was the folder moved meanwhile?")
    settings = _settings_within(status, overlay, stage=stage)
    require_frozen_trials(status)
    for path in inputs:
        _require_own(status, path)
    # Where the model lies and what runs it is this command's affair; the files keep the name they began with.
    own = {name: getattr(status.settings, name) for name in ("model", "device", "relation_csv_path")}
    status.fingerprint_fields |= {name: getattr(settings, name) for name in _free_fields(status, stage)}
    status.settings = replace(settings, **own)
    if model:
        status.expected_layers = list(range(model.arch.n_layers))
    return status


def _require_own(status: QidStatus, path: Path) -> None:
    """Raise InputError for an input that is not the folder's own file, or not as its stage wrote it."""
    folder = status.artifacts_dir.resolve()
    if not path.resolve().is_relative_to(folder):
        raise InputError(
            f"{path} is not a file of {status.artifacts_dir}, whose results would then rest on something else; "
            "write to another folder to combine them"
        )
    name = str(path.resolve().relative_to(folder))
    makers = [stage for stage, record in status.stages.items() if name in record.files]
    for maker in makers:
        if name in status.damaged(maker):
            raise InputError(f"{path} has been changed since {maker} wrote it; run that stage again, or put it back")


def _free_fields(status: QidStatus, stage: str) -> set[str]:
    """Settings that may still be chosen: no stage but ``stage`` itself has used them."""
    done = [name for name in status.stages if name != stage]
    return {name for name, first in _FIRST_USED_BY.items() if not any(_from(first, other) for other in done)}


def _from(first: str, stage: str) -> bool:
    """True if ``stage`` is the stage ``first`` or a later one, in the order of the spec."""
    order = ["heatmap", "stepE", "zeroshot", "step6"]
    group = "step6" if stage.startswith("step6") or stage in AFTER_STEP6 else stage
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
    return replace(open_for(settings), name=status.settings.model)


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
def _settling(status: QidStatus) -> Iterator[None]:
    """Afterwards say where the q_id stands: completed if all is there and intact, else pending with what comes next,
    or failed with the reason."""
    try:
        yield
    except Exception as problem:
        with suppress(RunError):  # a full disk: the last status stays
            status.set("failed", str(problem))
        raise
    except BaseException:  # SIGINT or SIGTERM
        status.set("pending", "interrupted; the same command goes on from here")
        raise
    if is_complete(status):
        status.set("completed")
        log.info("%s completed", status.q_id)
    else:
        missing = [name for name in status.stage_names if not status.intact(name)]
        status.set("pending", f"next stage: {missing[0]}")


@contextmanager
def _working_in(paths: QidPaths) -> Iterator[None]:
    """For work inside a q_id's folder: hold its lock, the same one as ``relfv run``, and log into it.

    Another command that holds it, say Step6 at another layer, is waited for. Raises InputError after a minute, and for
    links that lead out of the folder.
    """
    for ours in (paths.artifacts, paths.log.parent):
        require_no_links(ours, below=paths.artifacts.parent)
    require_no_links(paths.lock, below=paths.lock.parent.parent)
    with lock(paths.lock, wait_s=_WAIT_S) as holder:
        if holder:
            raise InputError(f"{paths.artifacts} is being written by {holder}; wait for it, or use another folder")
        remove_temporaries(paths.artifacts)
        with logging_to(paths.log):
            yield


def _same(one: Path, other: Path) -> bool:
    return one.resolve() == other.resolve()
