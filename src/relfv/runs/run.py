"""``relfv run``: take every q_id through every stage, with one model for all, and compute nothing twice.

A q_id is a unit of its own: it is locked while it runs, its failure does not stop the others, and whatever it has
finished is on disk. What a restart finds completed and intact it leaves alone; if that is everything, the model is
never opened.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

from relfv.errors import InputError, RelfvError
from relfv.logs import logging_to, remembering
from relfv.progress import at_work, counted
from relfv.relations import named
from relfv.report.known import Known
from relfv.report.page import is_up_to_date, page_path, write_report
from relfv.report.written_tables import TABLES_FOLDER, are_up_to_date, write_tables
from relfv.runs.crew import Crew, on_devices
from relfv.runs.doctor import rehearse
from relfv.runs.manifest import MANIFEST, run_description, sound_manifest, write_manifest
from relfv.runs.naming import take_names
from relfv.runs.on_ray import RayCrew
from relfv.runs.plan import RunPlan, RunRequest, make_plan, require_same_experiment
from relfv.runs.qid import its_own_trouble, loading
from relfv.runs.registered import register
from relfv.runs.rehearsal import more_on_a_card, outline_for
from relfv.runs.reuse import require_reusable
from relfv.runs.so_far import SoFar
from relfv.runs.worker import Worker
from relfv.store.files import move_aside, remove_temporaries, require_temporary_folder, temporaries
from relfv.store.locks import require_locks, sole_writer
from relfv.store.status import DamagedStatus, now
from relfv.store.unchanged import Unchanged

log = logging.getLogger(__name__)


def run_all(request: RunRequest) -> int:
    """Run all q_ids of ``request``. Returns the exit code: 1 if any failed, else 0.

    Raises InputError before anything is computed if the request cannot be run as it is.
    """
    request = on_devices(request)
    if request.dry_run:
        return rehearse(request)
    plan = make_plan(request)
    started_at = now()
    unchanged = Unchanged(plan.folder, keep=request.shard is None)
    with at_work("checking", "what is completed and intact, by its hashes", unit="q_ids"), unchanged.kept():
        finished = [] if request.force else [q for q in plan.relations if unchanged.holds(q, plan.asked(q))]
        rest = plan.besides(set(finished))
        rest.require_no_links()
        unusable = {} if request.force else rest.unusable_statuses()
        if not request.force:
            require_same_experiment(rest, besides=unusable)
        require_reusable(rest)
        afresh = [q_id for q_id, problem in unusable.items() if isinstance(problem, DamagedStatus)]
        skipped, todo = _queue(rest, set(unusable) - set(afresh), afresh, unchanged)
    with ExitStack() as at_end:
        with remembering() as said:
            _say_queue(plan, skipped, todo, n_unreadable=len(unusable) - len(afresh))
            # Open before anything is written or moved: a model that cannot be opened leaves everything as it was.
            workers = at_end.enter_context(closing(_opened(plan, len(todo)))) if todo else None
            if plan.written:
                register(plan, plan.written)
        if request.force:
            _move_all_aside(plan)
        with logging_to(plan.own("run.log"), said), unchanged.kept():
            if todo and not request.shard:
                require_locks(plan.folder)
            left_alone = _move_damaged_aside(plan, unusable)
            left_alone |= _write_waiting(plan, skipped, [q_id for q_id in todo if q_id not in left_alone])
            todo = [q_id for q_id in todo if q_id not in left_alone]
            if workers and todo:
                code = _run_todo(plan, skipped, todo, workers, started_at, unchanged)
            else:
                code = 0
                take_names(plan.folder, rest.relations)
                if not request.shard:
                    _finish_earlier_run(plan, skipped, started_at)
                n_done = len(plan.relations) - len(skipped.keys() | left_alone)
                everything = "everything is completed" if n_done else "there are no results"
                everything = "nothing else to do" if left_alone else everything
                log.log(
                    logging.INFO if n_done else logging.WARNING,
                    "%s: %d q_ids done, %d skipped, in %s",
                    everything,
                    n_done,
                    len(skipped),
                    plan.folder,
                )
            return 1 if left_alone else code


def _queue(
    plan: RunPlan, unreadable: Collection[str], afresh: Collection[str], unchanged: Unchanged
) -> tuple[dict[str, str], list[str]]:
    """-> (q_ids to skip with reasons, q_ids that are not completed and intact, or are to be done ``afresh``)."""
    skipped: dict[str, str] = {}
    todo: list[str] = []
    for q_id in counted([*plan.relations]):
        if q_id in unreadable:
            continue
        state = unchanged.state(q_id, plan.asked(q_id))
        if reason := plan.skip_reason(q_id):
            skipped[q_id] = reason
        elif plan.request.force or q_id in afresh or not plan.is_done(plan.status_on_disk(q_id)):
            todo.append(q_id)
        else:
            unchanged.note(q_id, state)
    return skipped, todo


def _say_queue(plan: RunPlan, skipped: Mapping[str, str], todo: Sequence[str], n_unreadable: int) -> None:
    if skipped:
        log.info("skipped: %s", named([f"{q_id} ({reason})" for q_id, reason in skipped.items()], "; "))
    if todo:
        done = len(plan.relations) - len(skipped) - len(todo) - n_unreadable
        log.info("%d q_ids to run, %d completed before, %d skipped", len(todo), done, len(skipped))


def _opened(plan: RunPlan, n_q_ids: int) -> Worker | Crew | RayCrew:
    """Open the request's model in the process or processes that will run ``n_q_ids``: this process, several, or a Ray
    cluster.

    Raises InputError if it cannot be opened, or has too few heads.
    """
    request = plan.request

    def check() -> None:  # called before the model's weights are read, which may take minutes
        require_temporary_folder()
        here = not request.ray and len(request.devices) <= 1
        with loading(request.settings, request.settings.device if here else ""):
            found = outline_for(request)
        if found and plan.written:
            plan.written.require_layers(found.arch.n_layers)
        if more := more_on_a_card(request, found, n_q_ids):
            log.info("%s", more)

    if len(request.devices) > 1:
        return Crew(plan, n_q_ids, check)
    if request.given is None:
        check()
    return RayCrew(plan, request.ray) if request.ray else Worker.opened(plan)


def _move_all_aside(plan: RunPlan) -> None:
    """--force: rename the chosen q_ids' folders, all or none; nothing is deleted."""
    there = [q_id for q_id in plan.relations if (plan.folder / q_id).exists()]
    for move in (False, True):  # nothing is moved before every folder is known to be free
        for q_id in there:
            with plan.locked(q_id) as holder:
                if holder:
                    raise InputError(f"{q_id} is being run by {holder}; --force would move its folder from under it")
                if move:
                    log.info("%s: earlier results moved to %s", q_id, move_aside(plan.folder / q_id))


def _move_damaged_aside(plan: RunPlan, unusable: Collection[str]) -> set[str]:
    """Move aside results whose status is damaged, which are neither trusted nor overwritten: their folder gets a dated
    name, and the q_id starts afresh. A status that only cannot be read is left alone. -> q_ids left alone, which were
    named in the log."""
    left_alone: set[str] = set()
    for q_id in unusable:
        with its_own_trouble(q_id, left_alone), plan.locked(q_id) as holder:
            try:  # under the lock: another run may have been here since
                plan.status_on_disk(q_id)
            except RelfvError as problem:
                if holder or not isinstance(problem, DamagedStatus):
                    log.error("%s%s", problem, f"; it is being written by {holder}" if holder else "")
                    left_alone.add(q_id)
                else:
                    aside = move_aside(plan.folder / q_id)
                    log.warning("%s. They are now in %s; %s starts afresh", problem, aside, q_id)
    return left_alone


def _write_waiting(plan: RunPlan, skipped: Mapping[str, str], todo: Sequence[str]) -> set[str]:
    """Write skipped and pending statuses, where they do not say so already. -> q_ids where that failed."""
    failed: set[str] = set()
    for q_id, reason in skipped.items():
        with its_own_trouble(q_id, failed):
            status = plan.status_on_disk(q_id)
            if status is None or (status.status, status.reason) != ("skipped", reason):
                with plan.locked(q_id) as holder:
                    if holder is None:
                        status = plan.new_status(q_id)
                        status.set("pending")
                        status.set("skipped", reason)
    for q_id in todo:
        with its_own_trouble(q_id, failed):
            if plan.status_with_results(q_id) is None:
                with plan.locked(q_id) as holder:
                    # Another run may have come and gone meanwhile, and its results must not be forgotten.
                    if holder is None and plan.status_with_results(q_id) is None:
                        plan.new_status(q_id).write()
    return failed


def _run_todo(
    plan: RunPlan, skipped: Iterable[str], todo: Sequence[str], workers: Worker | Crew | RayCrew, started_at: str,
    unchanged: Unchanged,
) -> int:  # fmt: skip
    take_names(plan.folder, {q_id: relation for q_id, relation in plan.relations.items() if q_id not in todo})
    description = {**_description(plan, started_at), "model": workers.description}
    write_manifest(plan.own(MANIFEST), description)
    outcomes: dict[str, str] = {}
    so_far = SoFar(plan.folder, of_all=plan.request.shard is None)
    with so_far.also_if_interrupted(), closing(workers), closing(workers.outcomes(todo)) as ended:
        so_far.write()
        for q_id, outcome in ended:
            outcomes[q_id] = outcome
            if outcome == "completed":
                unchanged.note(q_id, unchanged.state(q_id, plan.asked(q_id)))
            if len(outcomes) == len(todo):  # after the last q_id the manifest is written first
                continue
            if isinstance(workers, Worker):
                workers.in_a_pause(so_far.write_what_is_due)
            else:
                so_far.write_what_is_due()
    of_all = dict.fromkeys(skipped, "skipped") | outcomes
    write_manifest(plan.own(MANIFEST), {**description, "finished_at": now(), "outcomes": of_all})
    if not plan.request.shard:
        with at_work("report", "writing the tables and the page"):
            so_far.write_at_last()
    failed = [q_id for q_id, outcome in outcomes.items() if outcome == "failed"]
    if failed:
        said = "%d of %d q_ids failed: %s; the same command tries them again"
        log.error(said, len(failed), len(todo), named(failed))
    if plan.request.shard:
        log.info("when all shards have ended: relfv report %s", plan.folder)
    else:
        log.info("report: %s", page_path(plan.folder))
    return 1 if failed else 0


def _description(plan: RunPlan, started_at: str) -> dict[str, Any]:
    """Description of a run for the manifest, without its model."""
    return {
        "started_at": started_at,
        "finished_at": None,
        **run_description(plan.request.settings, list(plan.relations), plan.csv_sha256, plan.model_identity),
        **({"shard": "{}/{}".format(*plan.request.shard)} if plan.request.shard else {}),
        **({"devices": [*plan.request.devices]} if len(plan.request.devices) > 1 else {}),
        **({"reuse_stepd": str(plan.request.reuse_stepd)} if plan.request.reuse_stepd else {}),
    }


def _finish_earlier_run(plan: RunPlan, skipped: Iterable[str], started_at: str) -> None:
    """Finish what a run that was killed after its last q_id left undone: its page, and files that it was just writing.

    Where nothing was left undone nothing is touched.
    """
    if sound_manifest(plan.folder / MANIFEST) is None:
        outcomes = dict.fromkeys(skipped, "skipped")
        description = {**_description(plan, started_at), "finished_at": now(), "outcomes": outcomes}
        write_manifest(plan.own(MANIFEST), description)
    if temporaries(plan.folder, below=False):
        with sole_writer(plan.folder):
            pass
    known = Known(plan.folder)
    found = known.briefs()
    if not are_up_to_date(plan.folder, found) or temporaries(plan.folder / TABLES_FOLDER):
        write_tables(plan.folder, known)
    pages = page_path(plan.folder).parent
    if left := temporaries(pages):
        with sole_writer(pages):
            remove_temporaries(pages)  # q_ids' own pages, too
    if left or not is_up_to_date(plan.folder, found):
        log.info("report: %s", write_report(plan.folder, known))
    known.write()
