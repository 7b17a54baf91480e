"""``relfv run``: every q_id through every stage, one model for all, and nothing computed twice.

A q_id is a unit of its own: it is locked while it runs, its failure does not stop the others, and whatever it has
finished is on disk. What a restart finds completed and intact it leaves alone; if that is everything, the model is
never opened.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from relfv.errors import InputError, RelfvError
from relfv.language_model import LanguageModel
from relfv.logs import Progress, logging_to, printable, remembering, showing
from relfv.models.sources import model_identity
from relfv.relations import file_sha256, load_relations, relation_name, require_q_ids, rows_sha256
from relfv.report.page import page_path, write_report
from relfv.report.table import find_statuses
from relfv.runs.manifest import model_description, run_description, sound_manifest, write_manifest
from relfv.runs.qid import QidPipeline, is_complete, open_for
from relfv.settings import Settings, fingerprint_fields
from relfv.stages.trials import ineligible_reason
from relfv.steps import heads_to_sweep
from relfv.store.artifacts import MANIFEST, QidPaths
from relfv.store.files import (
    lock,
    move_aside,
    remove_temporaries,
    require_folder,
    require_no_links,
    sole_writer,
    temporaries,
)
from relfv.store.status import STATUS_FILE, DamagedStatus, QidStatus, now, read_status_of_results
from relfv.types import Relation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunRequest:
    """One call of ``relfv run``."""

    settings: Settings
    q_list: tuple[str, ...] | None
    """None for all of the CSV, in its order."""
    out_root: Path
    force: bool = False
    """Move existing folders of the chosen q_ids aside, under a dated name, and start afresh."""
    dry_run: bool = False
    """Say what would be done and touch nothing."""


@dataclass(frozen=True)
class Plan:
    """What is to be done, found out from the CSV and the folder alone."""

    request: RunRequest
    folder: Path
    """``<out_root>/<REL>``."""
    relations: dict[str, Relation]
    csv_sha256: str
    model_identity: str

    def artifacts_dir(self, q_id: str) -> Path:
        """``<out_root>/<REL>/<Q>/artifacts``."""
        return self.folder / q_id / "artifacts"

    @contextmanager
    def locked(self, q_id: str) -> Iterator[str | None]:
        """Hold the q_id's lock while open, with what a killed process left half-written removed; yields who else holds
        it, or None."""
        with lock(QidPaths(self.artifacts_dir(q_id), q_id).lock) as holder:
            if holder is None:
                remove_temporaries(self.artifacts_dir(q_id))
            yield holder

    def skip_reason(self, q_id: str) -> str | None:
        """Why a q_id cannot run under these settings, or None."""
        return ineligible_reason(self.relations[q_id], self.request.settings.n_demos)

    def new_status(self, q_id: str) -> QidStatus:
        """A pending status for a q_id that has none."""
        relation, settings = self.relations[q_id], self.request.settings
        settings = replace(settings, alpha_sweep=(), k_sweep=())  # what has been swept
        fields = fingerprint_fields(settings, rows_sha256=rows_sha256(relation), model_identity=self.model_identity)
        return QidStatus(self.artifacts_dir(q_id), q_id, settings, fields, q_row_count=len(relation.pairs))

    def status_on_disk(self, q_id: str) -> QidStatus | None:
        """The status in the q_id's folder. Raises DamagedStatus if results lie there that no status vouches for."""
        artifacts_dir = self.artifacts_dir(q_id)
        found = read_status_of_results(artifacts_dir)
        if found and found.q_id != q_id:
            raise DamagedStatus(artifacts_dir / STATUS_FILE, f"is damaged or of another q_id ({found.q_id})")
        return found

    def found_status(self, q_id: str) -> QidStatus | None:
        """The status on disk, if it has results to go on from."""
        found = self.status_on_disk(q_id)
        return found if found and found.has_results() else None


def make_plan(request: RunRequest) -> Plan:
    """Read and check the CSV and the q_ids asked for. Raises InputError."""
    csv_path = Path(request.settings.relation_csv_path)
    relations = load_relations(csv_path)
    chosen = list(relations) if request.q_list is None else list(dict.fromkeys(request.q_list))
    require_q_ids(chosen, relations, "--q_list", csv_path)
    folder = request.out_root / relation_name(csv_path)
    require_folder(folder, "--out_root")
    for ours in (".locks", "report", "run.log", MANIFEST, *chosen):
        require_no_links(folder / ours, below=request.out_root)
    return Plan(
        request,
        folder,
        {q_id: relations[q_id] for q_id in chosen},
        file_sha256(csv_path),
        model_identity(request.settings.model),
    )


def run(request: RunRequest) -> int:
    """Run all q_ids of ``request``. Returns the exit code: 1 if any failed, else 0.

    Raises InputError before anything is computed if the request cannot be run as it is.
    """
    plan = make_plan(request)
    if request.dry_run:
        return _say_plan(plan)
    started_at = now()
    unusable = {} if request.force else _unusable_statuses(plan)
    if not request.force:
        _require_same_experiment(plan, besides=unusable)
    afresh = [q_id for q_id, problem in unusable.items() if isinstance(problem, DamagedStatus)]
    skipped, todo = _queue(plan, unreadable=set(unusable) - set(afresh), afresh=afresh)
    done = len(plan.relations) - len(skipped) - len(todo) - (len(unusable) - len(afresh))
    with remembering() as said:
        if skipped:
            log.info("skipped: %s", "; ".join(f"{q_id} ({reason})" for q_id, reason in skipped.items()))
        if todo:
            log.info("%d q_ids to run, %d completed before, %d skipped", len(todo), done, len(skipped))
        # Before anything is written or moved: a model that cannot be opened leaves everything as it was.
        model = _open_model(plan) if todo else None
    if request.force:
        _force(plan)
    with logging_to(plan.folder / "run.log", said):
        left = _keep_aside(plan, unusable)
        todo = [q_id for q_id in todo if q_id not in left]
        _write_waiting(plan, skipped, todo)
        if model and todo:
            code = _run_todo(plan, todo, model, started_at)
        else:
            code = 0
            if sound_manifest(plan.folder) is None:
                write_manifest(plan.folder, {**_description(plan, started_at), "finished_at": now(), "outcomes": {}})
            _finish_ending(plan)
            everything = "nothing else to do" if left else "everything is completed"
            log.info("%s: %d q_ids done, %d skipped, in %s", everything, done, len(skipped), plan.folder)
        return 1 if left else code


def _description(plan: Plan, started_at: str) -> dict[str, Any]:
    """What the manifest says of a run without its model."""
    return {
        "started_at": started_at,
        "finished_at": None,
        **run_description(plan.request.settings, list(plan.relations), plan.csv_sha256, plan.model_identity),
    }


def _open_model(plan: Plan) -> LanguageModel:
    """The model of the request. Raises InputError if it cannot be opened, or has too few heads."""
    settings = plan.request.settings
    model = open_for(settings)
    n_heads = len(heads_to_sweep(model, settings))
    for flag, k in (("--topk", settings.topk), *(("--k_sweep", k) for k in settings.k_sweep)):
        if k > n_heads:
            raise InputError(f"{flag} {k}: {model.name} has {n_heads} heads to choose from; expected at most that")
    return model


def _run_todo(plan: Plan, todo: Sequence[str], model: LanguageModel, started_at: str) -> int:
    description = {**_description(plan, started_at), "model": model_description(model)}
    write_manifest(plan.folder, description)

    progress = Progress(len(todo))
    outcomes: dict[str, str] = {}
    with showing(progress):
        for q_id in todo:
            progress.begin()
            outcomes[q_id] = _run_one(plan, q_id, model)
            log.info("%s %s in %.1f s", q_id, outcomes[q_id], progress.seconds())
            progress.end()
    description["finished_at"] = now()
    description["outcomes"] = outcomes
    write_manifest(plan.folder, description)
    page = write_report(plan.folder)
    failed = [q_id for q_id, outcome in outcomes.items() if outcome == "failed"]
    if failed:
        log.error(
            "%d of %d q_ids failed: %s; the same command tries them again",
            len(failed),
            len(todo),
            ", ".join(failed),
        )
    log.info("report: %s", page)
    return 1 if failed else 0


def _finish_ending(plan: Plan) -> None:
    """What a run that was killed after its last q_id left undone: its page, and what it was just writing.

    Where nothing was left undone nothing is touched.
    """
    if temporaries(plan.folder, below=False):
        with sole_writer(plan.folder):
            pass
    page = page_path(plan.folder)
    statuses = [folder / STATUS_FILE for folder in find_statuses(plan.folder)]
    newest = max((path.stat().st_mtime_ns for path in statuses), default=0)
    if not page.exists() or page.stat().st_mtime_ns < newest or temporaries(page.parent):
        log.info("report: %s", write_report(plan.folder))


def _run_one(plan: Plan, q_id: str, model: LanguageModel) -> str:
    """One q_id under its lock. Returns its outcome; only an interrupt passes through."""
    with ExitStack() as stack:
        holder = stack.enter_context(plan.locked(q_id))
        if holder:
            also = "; for its sweeps run the same command again" if plan.request.settings.sweeps else ""
            log.warning("%s is being run by %s; left to it%s", q_id, holder, also)
            return "left to another run"
        # Read under the lock: since the plan was made another run may have come and gone, with other settings.
        try:
            status = plan.found_status(q_id) or plan.new_status(q_id)
        except RelfvError as problem:
            log.error("%s failed: %s", q_id, problem)
            return "failed"
        if differences := describe_differences(status, plan.new_status(q_id)):
            log.error("%s was meanwhile begun by another run: %s; left alone", q_id, ", ".join(differences))
            return "failed"
        if _is_done(plan, status):
            log.info("%s was meanwhile completed by another run", q_id)
            return status.status
        complete = False
        pipeline = QidPipeline(status, plan.relations[q_id], plan.csv_sha256, lambda: model)
        try:
            stack.enter_context(logging_to(pipeline.paths.log))
            pipeline.run()
            complete = True
            pipeline.run_sweeps(plan.request.settings)
        except Exception as problem:  # a q_id's failure, whatever it is, is recorded and does not stop the others
            reason = str(problem) if isinstance(problem, RelfvError) else f"{type(problem).__name__}: {problem}"
            log.error("%s failed: %s", q_id, reason)
            log.debug("traceback", exc_info=not isinstance(problem, RelfvError))
            if complete:
                log.warning("%s: only its sweeps are missing; everything else is complete", q_id)
            else:
                _record(status, "failed", reason)
            return "failed"
        except BaseException:  # SIGINT or SIGTERM: say where it stands, then let it through
            if not complete:
                _record(status, "pending", "interrupted; the same command goes on from here")
            log.warning("%s interrupted; what was finished is on disk, and the same command goes on from there", q_id)
            raise
        return status.status


def _record(status: QidStatus, state: str, reason: str) -> None:
    """Write a final state; if even that cannot be written, the old file stays, which a restart goes on from as well."""
    try:
        status.set(state, reason)  # type: ignore[arg-type]
    except RelfvError as problem:
        log.warning("%s; the last status stays", problem)


def _unusable_statuses(plan: Plan) -> dict[str, RelfvError]:
    """q_ids whose status cannot be read or is damaged, with the reason."""
    unusable = {}
    for q_id in plan.relations:
        try:
            plan.status_on_disk(q_id)
        except RelfvError as problem:
            unusable[q_id] = problem
    return unusable


def _keep_aside(plan: Plan, unusable: Collection[str]) -> list[str]:
    """Results whose status is damaged are neither trusted nor overwritten: their folder gets a dated name, and the q_id
    starts afresh. What only cannot be read is left alone. -> q_ids left alone, which were named in the log."""
    left = []
    for q_id in unusable:
        with plan.locked(q_id) as holder:
            try:  # under the lock: another run may have been here since
                plan.status_on_disk(q_id)
            except RelfvError as problem:
                if holder or not isinstance(problem, DamagedStatus):
                    log.error("%s%s", problem, f"; it is being written by {holder}" if holder else "")
                    left.append(q_id)
                else:
                    log.warning(
                        "%s. They are now in %s; %s starts afresh", problem, move_aside(plan.folder / q_id), q_id
                    )
    return left


def _queue(plan: Plan, unreadable: Collection[str], afresh: Collection[str]) -> tuple[dict[str, str], list[str]]:
    """-> (q_ids to skip with reasons, q_ids that are not completed and intact, or are to be done ``afresh``)."""
    skipped: dict[str, str] = {}
    todo: list[str] = []
    for q_id in plan.relations:
        if q_id in unreadable:
            continue
        if reason := plan.skip_reason(q_id):
            skipped[q_id] = reason
        elif plan.request.force or q_id in afresh or not _is_done(plan, plan.status_on_disk(q_id)):
            todo.append(q_id)
    return skipped, todo


def _is_done(plan: Plan, found: QidStatus | None) -> bool:
    """True if a q_id has all that is asked for."""
    if found is None or found.status != "completed" or not is_complete(found):
        return False
    return found.has_sweeps_of(plan.request.settings)


def _write_waiting(plan: Plan, skipped: Mapping[str, str], todo: Sequence[str]) -> None:
    """Write skipped and pending statuses, where they do not say so already."""
    for q_id, reason in skipped.items():
        found = plan.status_on_disk(q_id)
        if found is None or (found.status, found.reason) != ("skipped", reason):
            with plan.locked(q_id) as holder:
                if holder is None:
                    plan.new_status(q_id).set("skipped", reason)
    for q_id in todo:
        if plan.found_status(q_id) is None:
            with plan.locked(q_id) as holder:
                # Another run may have come and gone since ``found``, and its results must not be forgotten.
                if holder is None and plan.found_status(q_id) is None:
                    plan.new_status(q_id).write()


def _require_same_experiment(plan: Plan, besides: Collection[str]) -> None:
    """Raise InputError if a folder holds results of other settings, rows, model or algorithm, naming what differs."""
    problems = []
    for q_id in plan.relations:
        found = None if q_id in besides else plan.found_status(q_id)
        if found is None:
            continue
        differences = describe_differences(found, plan.new_status(q_id))
        if differences:
            problems.append(f"{q_id} ({', '.join(differences)})")
    if problems:
        raise InputError(
            f"{plan.folder} holds results of another experiment: {'; '.join(problems[:5])}"
            f"{f'; and {len(problems) - 5} more' if len(problems) > 5 else ''}. Use another --out_root, or --force to "
            "move those folders aside"
        )


def describe_differences(found: QidStatus, wanted: QidStatus) -> list[str]:
    """In what two experiments differ: settings by name with both values, rows and model in words."""
    there, here = found.fingerprint_fields, wanted.fingerprint_fields
    words = {
        "rows_sha256": f"the rows of {found.q_id} in the CSV have changed",
        "model_identity": "the model's files or revision have changed",
    }
    return [
        words.get(name, f"{name} was {there.get(name)}, now {here.get(name)}")
        for name in dict.fromkeys([*there, *here])
        if there.get(name) != here.get(name)
    ]


def _force(plan: Plan) -> None:
    """--force: rename the chosen q_ids' folders; nothing is deleted."""
    for q_id in plan.relations:
        folder = plan.folder / q_id
        if not folder.exists():
            continue
        with plan.locked(q_id) as holder:
            if holder:
                raise InputError(f"{q_id} is being run by {holder}; --force would move its folder from under it")
            log.info("%s: earlier results moved to %s", q_id, move_aside(folder))


def _say_plan(plan: Plan) -> int:
    lines = [
        f"output  {plan.folder}",
        f"model   {plan.request.settings.model} ({plan.model_identity[:40]})",
        *(f"departs from the spec: {departure}" for departure in plan.request.settings.departures()),
    ]
    unusable = _unusable_statuses(plan)
    for q_id, relation in plan.relations.items():
        lines.append(f"{q_id:<8} {len(relation.pairs):>4} rows  {unusable.get(q_id) or _what_would_happen(plan, q_id)}")
    print("\n".join(map(printable, lines)))
    return 0


def _what_would_happen(plan: Plan, q_id: str) -> str:
    if reason := plan.skip_reason(q_id):
        return f"skip: {reason}"
    found = plan.found_status(q_id)
    if found is None:
        return "run (new)"
    if plan.request.force:
        return "move the earlier results aside, then run"
    if differences := describe_differences(found, plan.new_status(q_id)):
        return f"refuse: {', '.join(differences)}"
    if _is_done(plan, found):
        return "completed, nothing to do"
    if found.status == "completed" and is_complete(found):
        return "completed, sweeps to be added"
    return f"run (now {found.status})"
