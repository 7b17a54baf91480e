"""The steps of one q_id, each recorded in ``qid_status.json`` once its files are on disk.

A restart skips what is done: recorded, on disk with the recorded hash, and made from inputs that still have theirs.
What is missing, damaged or out of date is repeated; a step repeated to the same bytes leaves later ones done.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from relfv.errors import RelfvError, RunError, in_words
from relfv.models.ahead import under_way
from relfv.models.context import TooLong
from relfv.models.given import GivenModel
from relfv.pace import Pace
from relfv.progress import at_work
from relfv.requests import with_requests_of
from relfv.settings import Settings
from relfv.signals import raise_received
from relfv.stages import trials
from relfv.stages.stage import Stage, Step, Work
from relfv.stages.table import STAGES, asked_for, is_complete, is_done, not_done, steps
from relfv.store.files import require_temporary_folder
from relfv.store.findings import Findings
from relfv.store.folder import QidFolder
from relfv.store.status import QidStatus
from relfv.types import Relation

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel

log = logging.getLogger(__name__)

_LAYERS_A_RECORD = 8
"""Layers of one stage whose records are written together; after a kill at most as many are repeated."""


@contextmanager
def loading(settings: Settings, device: str, given: GivenModel | None = None) -> Iterator[None]:
    """While open, PyTorch and transformers are imported, and ``device`` (under_way) and the model's files get ready.

    Raises InputError for a model that is not there."""
    begun = nullcontext() if given else under_way(settings.model, settings.revision, device)
    with at_work(f"opening {settings.model}", "loading PyTorch and transformers"), begun:
        yield


def open_for(settings: Settings, given: GivenModel | None = None) -> LanguageModel:
    """The model that ``settings`` name, or the one that is ``given``."""
    require_temporary_folder()
    with loading(settings, settings.device, given):
        from relfv.language_model import open_given, open_model

    if given:
        spec, quant = settings.model_spec, settings.quant
        return open_given(given, spec, quant=quant, precision=settings.precision)  # type: ignore[arg-type]
    return open_model(
        settings.model,
        settings.model_spec,
        revision=settings.revision,
        device=settings.device,
        dtype=settings.dtype,
        quant=settings.quant,
        offload=settings.offload,
        precision=settings.precision,  # type: ignore[arg-type]
        trust_remote_code=settings.trust_remote_code,
        findings=Findings(afresh=settings.self_check == "always"),
    )


def no_model() -> LanguageModel:
    """Stand-in for opening the model, for work whose stages need none."""
    raise AssertionError("this stage needs no model")


def work_on(
    status: QidStatus,
    opened: Callable[[], LanguageModel],
    *,
    relation: Relation | None = None,
    csv_sha256: str = "",
    pace: Pace | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> Work:
    """The work on the q_id of ``status``; ``opened`` is called only when a step needs the model."""
    return Work(
        QidFolder(status.artifacts_dir, status.q_id),
        status.settings,
        # The model may have been moved since the q_id was begun; its files keep the name they began with.
        lambda: replace(opened(), name=status.settings.model),
        status.expected_layers,
        status.trials_per_pass,
        relation,
        csv_sha256,
        str(status.fingerprint_fields.get("model_identity", "")),
        status.name,
        pace or Pace(1),
        meanwhile,
    )


def run_qid(status: QidStatus, work: Work) -> None:
    """Run every step that is not done, until the q_id is complete; what a step raises passes through.

    Raises RunError if the frozen trials were changed.
    """
    require_frozen_trials(status)
    if not status.expected_layers:
        status.expected_layers = work.layers = list(range(work.model.arch.n_layers))
    if not is_complete(status):
        status.set("running")
        run_steps(status, work)


def run_steps(status: QidStatus, work: Work, of: Iterable[Stage] = STAGES) -> None:
    """Run the steps of some stages that are missing, damaged, or made from inputs that have changed since."""
    for step in steps(status.expected_layers, of=of, extras=work.settings.has_extras):
        if not is_done(status, step):
            run_step(work, step, status, write=False)  # the next step's beginning, or ``settling``, writes the status


def add_requests(status: QidStatus, work: Work, asked: Settings) -> None:
    """Add the sweeps and studies that ``asked`` has to those of a complete q_id, which stays complete whatever stops
    this."""
    before = status.settings
    wanted = with_requests_of(before, asked)
    for stage in missing_requests(status, asked, work.relation):
        if is_done(status, stage.step()) and _of_other_rows(stage, status, work.relation):
            log.warning("%s %s: of other relations' rows than the CSV has now; it is made again", work.q_id, stage.name)
        work.settings = wanted
        if stage.asked and stage.asked(wanted) != stage.asked(before):  # other values may fit another number in a pass
            work.trials_per_pass.pop(stage.name, None)
        run_step(work, stage.step(), status)


def missing_requests(status: QidStatus, asked: Settings, relation: Relation | None) -> list[Stage]:
    """The stages that ``asked``, or an earlier run, asks for beyond what completes the q_id, and that are missing or
    damaged, or were made for a smaller request, or for other relations than those beside ``relation`` now."""
    wanted = with_requests_of(status.settings, asked)
    return [
        stage
        for stage in asked_for(wanted)
        if stage.asked
        and (
            stage.asked(wanted) != stage.asked(status.settings)
            or not is_done(status, stage.step())
            or _of_other_rows(stage, status, relation)
        )
    ]


def _of_other_rows(stage: Stage, status: QidStatus, relation: Relation | None) -> bool:
    """Whether a stage that is done used rows of other relations that have changed in the CSV since."""
    folder = QidFolder(status.artifacts_dir, status.q_id)
    return bool(stage.made_for and relation and not stage.made_for(folder, relation, status.settings))


def with_extras_of(status: QidStatus, asked: Settings) -> Settings:
    """The settings of ``status`` with the extras that are asked for; extras that were begun once are finished."""
    if status.settings.studies:
        return status.settings
    begun = any(stage.extra and stage.name in status.stages for stage in STAGES)
    return replace(status.settings, extras="all" if begun or asked.has_extras else "none")


def has_extras(status: QidStatus, asked: Settings) -> bool:
    """Whether a complete q_id has the extras that are asked for."""
    return status.settings.has_extras or not asked.has_extras


def run_step(work: Work, step: Step, status: QidStatus | None = None, *, write: bool = True) -> None:
    """Run one step between its two marks in the status, if there is one; with ``write=False`` the second mark is
    written by what comes next."""
    raise_received()  # raise an interrupt that a library swallowed
    started, q_id = time.monotonic(), f"{status.q_id} " if status else ""
    if status:
        for folder in status.make_way(step.name):
            log.warning("%s %s: a folder stood where a file belongs; it is now %s", status.q_id, step.name, folder)
        # Each of 32 to 80 layers takes milliseconds: a mark for every one would cost as much as the layer. A stage that
        # is made on request gets no mark, since it is not missing before it is there.
        first_of_some = step.layer is None or step.layer % _LAYERS_A_RECORD == 0
        status.begin(step.name, write=first_of_some and not step.stage.asked)
    try:
        before = work.pace.begin_stage(step.stage.name)
        with at_work(f"{q_id}{step.name}", step.stage.about, before if step.layer is None else None, unit="prompts"):
            said = step.run(work)
    except Exception:
        raise_received()  # raise an interrupt that a library turned into an error
        raise
    if status:
        status.settings = work.settings
        outputs, inputs = (work.folder.hashes(of(work.folder, work.layers)) for of in (step.outputs, step.inputs))
        status.finish(step.name, outputs, inputs, write=write)
    # The terminal shows only the summary of all layers; the log file has a line for each.
    level = logging.INFO if step.layer is None else logging.DEBUG
    log.log(level, "%s%s %.2f s: %s", q_id, step.name, time.monotonic() - started, said)


@contextmanager
def settling(status: QidStatus) -> Iterator[None]:
    """Record at the end where the q_id stands: completed if everything is there and intact, else pending with what
    comes next, or failed, or skipped if its prompts are too long for the model, with the reason."""
    try:
        yield
        following = next(not_done(status), None)
        if following is None:
            status.set("completed")
        else:
            status.set("pending", f"next stage: {following.name}")
    except TooLong as problem:
        if not status.has_results():  # records of existing results are kept
            status.stages.clear()
        _record(status, "failed" if status.stages else "skipped", str(problem))
        raise
    except Exception as problem:
        _record(status, "failed", in_words(problem))
        raise
    except BaseException:  # SIGINT or SIGTERM
        _record(status, "pending", "interrupted; the same command goes on from here")
        raise


@contextmanager
def its_own_trouble(q_id: str, failed: set[str]) -> Iterator[None]:
    """Report an error that concerns one q_id, such as a folder in the place of its lock, without stopping the
    others."""
    try:
        yield
    except (RelfvError, OSError) as problem:
        log.error("%s failed: %s", q_id, in_words(problem))
        failed.add(q_id)


def _record(status: QidStatus, state: str, reason: str) -> None:
    """Write a final state; if even that cannot be written, the old file stays, which a restart goes on from as well."""
    try:
        status.set(state, reason)  # type: ignore[arg-type]
    except RelfvError as problem:
        log.warning("%s; the last status stays", problem)


def require_frozen_trials(status: QidStatus) -> None:
    """Raise RunError if sampled_trials.json is not what StepD froze: everything after it would be of other trials."""
    record = status.stages.get(trials.STAGE.name)
    if record and record.status == "completed" and status.damaged(trials.STAGE.name):
        raise RunError(
            f"{status.artifacts_dir / trials.TRIALS.name}: the frozen trials were changed or removed since StepD; "
            f"every result here rests on them. Put the file back, or start afresh: 'relfv run --q_list {status.q_id} "
            "--force' moves this folder aside"
        )
