"""A worker: one opened model that takes q_ids, one after another, each under its lock.

``relfv run`` has one in its own process, or one in each of several (crew.py). Who hands out the q_ids does not matter
to it: a q_id that another process holds, or has finished, it leaves alone.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from relfv.errors import RelfvError, in_words
from relfv.logs import logging_to
from relfv.models.context import TooLong
from relfv.models.memory import share_cards
from relfv.pace import Pace
from relfv.progress import at_work, headed
from relfv.relations import called
from relfv.report.sections import MOST_ON_ONE_PAGE, write_own_page
from relfv.runs.figure import add_figures
from relfv.runs.manifest import model_description
from relfv.runs.plan import RunPlan
from relfv.runs.qid import add_requests, its_own_trouble, open_for, run_qid, settling, with_extras_of, work_on
from relfv.runs.rehearsal import require_enough_heads
from relfv.runs.reuse import reuse_step_d
from relfv.stages.table import asked_for, shares
from relfv.store.status import QidStatus

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel

log = logging.getLogger(__name__)


@dataclass
class Worker:
    """One opened model, and the pace at which it works through the plan's q_ids."""

    plan: RunPlan
    model: LanguageModel
    pace: Pace = field(default_factory=lambda: Pace(1))
    _put_off: Callable[[], None] | None = field(default=None, repr=False)

    @staticmethod
    def opened(plan: RunPlan) -> Worker:
        """Make a worker by opening the model of the request. Raises InputError if it cannot be opened, or has too few
        heads."""
        if (n := plan.request.processes_a_card) > 1:  # the number includes this process
            from relfv.models.devices import choose_devices, taken

            share_cards(n, taken(choose_devices(plan.request.settings.device)))
        model = open_for(plan.request.settings, plan.request.given)
        require_enough_heads(model, plan.request.settings)
        # Half a million objects stay: each garbage collection of them takes as long as Step6.
        gc.freeze()
        return Worker(plan, model)

    @cached_property
    def description(self) -> dict[str, Any]:
        """Description of the worker's model, for the manifest."""
        return model_description(self.model)

    def outcomes(self, q_ids: Sequence[str]) -> Generator[tuple[str, str]]:
        """Run ``q_ids`` one after another. Yields each with how it ended."""
        self.pace = Pace(len(q_ids), shares(self.plan.request.settings.has_extras))
        with at_work("run", "between stages"), headed(self.pace.heading):
            for i, q_id in enumerate(q_ids):
                outcome = self.run(q_id)
                say_outcome(self.plan, q_id, outcome, self.pace.seconds())
                self.pace.end(lambda i=i: self.plan.n_free(q_ids[i + 1 :]))
                yield q_id, outcome

    def still_computes(self) -> bool:
        """Whether all the model's devices still compute, after a failure."""
        from relfv.models.devices import still_compute

        return still_compute(self.model.backbone.devices)

    def in_a_pause(self, do: Callable[[], None]) -> None:
        """Call ``do`` in a pause of this process: while a GPU computes the next q_id's sweep; on a CPU, where there is
        no pause, now; if no sweep comes, when this method is called for the next q_id."""
        self._pause()  # call what is still put off: the last q_id had no sweep
        self._put_off = do
        if self.model.backbone.device.type == "cpu":
            self._pause()

    def _pause(self) -> None:
        do, self._put_off = self._put_off, None
        try:
            if do:
                do()
        except Exception as problem:  # not this q_id's failure; tried again at the end of the run
            log.warning("page and tables are not written yet: %s", in_words(problem))

    def close(self) -> None:
        """Let Python's garbage collector look through the model again."""
        gc.unfreeze()

    def run(self, q_id: str) -> str:
        """Run one q_id. -> how it ended, ``completed`` where all is well; only an interrupt passes through."""
        self.pace.begin()
        with its_own_trouble(q_id, set()):
            return self._run(q_id)
        return "failed"

    def _run(self, q_id: str) -> str:
        with self.plan.locked(q_id) as holder:
            if holder:
                also = (
                    "; run the same command again afterwards, for what that run was not asked"
                    if asked_for(self.plan.request.settings)
                    else ""
                )
                log.warning("%s is left to %s, which is at it%s", q_id, holder, also)
                return "left to another run"
            # Read under the lock: since the plan was made another run may have come and gone, with other settings.
            status = self.plan.status_with_results(q_id) or self.plan.new_status(q_id)
            if differing := self.plan.differences(status):
                log.error("%s was meanwhile begun by another run: %s; left alone", q_id, ", ".join(differing))
                return "failed"
            if self.plan.is_done(status):
                log.info("%s was meanwhile completed by another run", q_id)
                return status.status
            outcome = self._run_locked(status)
            self._write_own_page(status)
            return outcome

    def _write_own_page(self, status: QidStatus) -> None:
        """Write the q_id's own page if there are very many q_ids: here, where several processes are at work, and not in
        the one that writes what covers all of them."""
        request = self.plan.request
        alone = request.shard or request.ray or len(self.plan.relations) <= MOST_ON_ONE_PAGE
        if status.status == "completed" and not alone:
            try:
                write_own_page(self.plan.folder, status.artifacts_dir)
            except Exception as problem:  # writing the relation's page tries again, and reports it
                log.debug("%s", in_words(problem))

    def _run_locked(self, status: QidStatus) -> str:
        plan, asked = self.plan, self.plan.request.settings
        q_id, status.settings = status.q_id, with_extras_of(status, asked)
        relation = plan.relations[q_id]
        status.name = relation.name
        work = work_on(
            status,
            lambda: self.model,
            relation=relation,
            csv_sha256=plan.csv_sha256,
            pace=self.pace,
            meanwhile=self._pause,
        )
        complete = False
        with ExitStack() as stack:
            try:
                with settling(status):
                    stack.enter_context(logging_to(work.folder.log))
                    reuse_step_d(plan, status)
                    work.layers = status.expected_layers
                    run_qid(status, work)
                complete = True
                add_requests(status, work, asked)
                add_figures(status, work, asked)
            except TooLong as problem:
                if status.status == "skipped":
                    log.warning("%s skipped: %s", q_id, problem)
                else:
                    log.error("%s failed: %s", q_id, problem)
                return status.status
            except Exception as problem:  # a q_id's failure, whatever it is, is recorded and does not stop the others
                log.error("%s failed: %s", q_id, in_words(problem))
                log.debug("traceback", exc_info=not isinstance(problem, RelfvError))
                if complete:
                    log.warning("%s: only sweeps, studies or figures are missing; everything else is complete", q_id)
                return "failed"
            except BaseException:  # SIGINT or SIGTERM
                log.warning(
                    "%s interrupted; what was finished is on disk, and the same command goes on from there", q_id
                )
                raise
            return status.status


def say_outcome(plan: RunPlan, q_id: str, outcome: str, seconds: float) -> None:
    """Log the outcome of a q_id in one line."""
    log.info("%s %s in %.1f s", called(q_id, plan.relations[q_id].name), outcome, seconds)
