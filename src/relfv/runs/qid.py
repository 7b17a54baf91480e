"""The stages of one q_id in the order of the spec, each recorded in ``qid_status.json`` once its files are on disk.

A restart skips what is intact: recorded, on disk with the recorded hash, and made from inputs that still have theirs.
What is missing, damaged or out of date is made again; a stage made again to the same bytes leaves later ones intact.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

from relfv.errors import RunError
from relfv.language_model import LanguageModel, open_model
from relfv.settings import Settings
from relfv.signals import raise_received
from relfv.stages.clean_trials import CleanTrials
from relfv.steps import (
    StageResult,
    Step6,
    clean_trials,
    step6_answers,
    step6_controls,
    step6_summary,
    step6_sweeps,
    step_curve,
    step_d_cie,
    step_d_means,
    step_d_trials,
    step_e,
    step_heatmap,
    step_zero_shot,
    write_summary,
)
from relfv.store.artifacts import QidPaths
from relfv.store.status import STEP6_STAGE, SWEEPS, QidStatus, step6_stage
from relfv.types import Relation

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Stage:
    """One stage: its name in qid_status.json, and what it does."""

    name: str
    run: Callable[[], StageResult]


def open_for(settings: Settings) -> LanguageModel:
    """The model that ``settings`` name."""
    return open_model(
        settings.model,
        settings.model_spec,
        device=settings.device,
        dtype=settings.dtype,
        quant=settings.quant,
        precision=settings.precision,  # type: ignore[arg-type]
        trust_remote_code=settings.trust_remote_code,
    )


class QidPipeline:
    """All stages of one q_id, resumable. ``model`` is called only when a stage needs it."""

    def __init__(
        self, status: QidStatus, relation: Relation, csv_sha256: str, model: Callable[[], LanguageModel]
    ) -> None:
        self.status = status
        self.paths = QidPaths(status.artifacts_dir, status.q_id)
        self._relation, self._csv_sha256 = relation, csv_sha256
        # The model may have been moved since the q_id was begun; its files keep the name they began with.
        self._model = lambda: replace(model(), name=status.settings.model)
        self._step6: Step6 | None = None

    def run(self) -> None:
        """Run what is missing or damaged, and what depends on it, until every stage is done.

        Raises RunError if the frozen trials were changed; whatever a stage raises passes through.
        """
        require_frozen_trials(self.status)
        if not self.status.expected_layers:
            self.status.expected_layers = list(range(self._model().arch.n_layers))
        if not is_complete(self.status):
            self.status.set("running")
            self.run_stages(self.status.stage_names)
        self.status.set("completed")

    def run_sweeps(self, asked: Settings) -> None:
        """Add the alphas and k that ``asked`` has to those of a completed q_id.

        Whatever stops it, the q_id stays completed, with the sweeps that it had.
        """
        status = self.status
        if status.has_sweeps_of(asked):
            return
        before, settings = status.stages.get(SWEEPS), status.settings
        wanted = settings.with_sweeps_of(asked)
        # Of other values another number of prompts may fit.
        per_pass = status.trials_per_pass.get(SWEEPS) if wanted == settings else None
        status.settings = wanted
        try:
            run_recorded(status, Stage(SWEEPS, lambda: step6_sweeps(self._model(), wanted, self.paths, per_pass)))
        except BaseException:
            if before is None or before.status == "completed":  # else a killed run has left what it was about to do
                status.settings = settings
                del status.stages[SWEEPS]
                status.stages |= {SWEEPS: before} if before else {}
                status.write()
            raise

    def run_stages(self, names: Sequence[str]) -> None:
        """Of the named stages, run those that are missing, damaged, or made from inputs that have changed since."""
        for stage in self.stages():
            if stage.name in names and not self.status.intact(stage.name):
                run_recorded(self.status, stage)

    def stages(self) -> list[Stage]:
        """In the order of the spec."""
        paths, settings, model = self.paths, self.status.settings, self._model
        layers, per_pass = self.status.expected_layers, self.status.trials_per_pass
        clean = cache(lambda: clean_trials(model(), paths.trials))
        bodies: dict[str, Callable[[], StageResult]] = {
            "stepD_trials": lambda: step_d_trials(model(), self._relation, settings, self._csv_sha256, paths),
            "stepD_means": lambda: step_d_means(model(), clean(), paths),
            "stepD_cie": lambda: step_d_cie(model(), settings, paths, per_pass.get("stepD_cie")),
            "heatmap": lambda: step_heatmap(paths, settings.score_key, settings.topk),
            "stepE": lambda: step_e(model(), settings, paths, paths.trials, clean(), paths, per_pass),
            "zeroshot": lambda: step_zero_shot(paths.trials, paths.zero_shot_trials),
            **{step6_stage(layer): self._at_layer(layer) for layer in layers},
            **after_step6(self.status, paths, model, clean),
        }
        return [Stage(name, bodies[name]) for name in self.status.stage_names]

    def _at_layer(self, layer: int) -> Callable[[], StageResult]:
        def run() -> StageResult:
            if self._step6 is None:
                self._step6 = Step6(self._model(), self.status.settings, self.paths.fv, self.paths.zero_shot_trials)
            return self._step6.run(layer, self.paths.step6_layer(layer), self.status.trials_per_pass.get("step6"))

        return run


def after_step6(
    status: QidStatus, paths: QidPaths, model: Callable[[], LanguageModel], clean: Callable[[], CleanTrials]
) -> dict[str, Callable[[], StageResult]]:
    """What is made once every layer has its results, by stage."""
    settings, layers = status.settings, status.expected_layers
    return {
        "step6_summary": lambda: step6_summary(paths, settings.score_key, layers),
        "injection_curve": lambda: step_curve(paths),
        "step6_controls": lambda: step6_controls(
            model(), clean(), settings, paths, status.trials_per_pass.get("step6_controls")
        ),
        "step6_answers": lambda: step6_answers(model(), settings, paths),
        "summary": lambda: write_summary(paths),
    }


def require_frozen_trials(status: QidStatus) -> None:
    """Raise RunError if sampled_trials.json is not what StepD froze: everything after it would be of other trials."""
    record = status.stages.get("stepD_trials")
    if record and record.status == "completed" and status.damaged("stepD_trials"):
        raise RunError(
            f"{status.artifacts_dir / 'sampled_trials.json'}: the frozen trials were changed or removed since StepD; every "
            f"result here rests on them. Put the file back, or start afresh: 'relfv run --q_list {status.q_id} --force' moves "
            "this folder aside"
        )


def is_complete(status: QidStatus) -> bool:
    """True if every stage is recorded as done and every promised file is there, unchanged."""
    return bool(status.expected_layers) and all(status.intact(name) for name in status.stage_names)


def run_recorded(status: QidStatus | None, stage: Stage) -> None:
    """Run one stage between its two marks in the status, if there is one."""
    raise_received()  # an interrupt that a library kept to itself
    started = time.monotonic()
    # 32 to 80 layers take milliseconds each: a mark when they begin would cost as much as they do.
    is_layer = stage.name.startswith(STEP6_STAGE)
    if status:
        for folder in status.make_way(stage.name):
            log.warning("%s %s: a folder stood where a file belongs; it is now %s", status.q_id, stage.name, folder)
        status.begin(stage.name, write=not is_layer)
    try:
        result = stage.run()
    except Exception:
        raise_received()  # or made an error of
        raise
    if status:
        status.trials_per_pass |= result.trials_per_pass
        status.finish(stage.name, result.files, result.inputs)
    q_id = f"{status.q_id} " if status else ""
    # They make one line on the terminal, too, that of their summary; the log file has them all.
    level = logging.DEBUG if is_layer else logging.INFO
    log.log(level, "%s%s %.2f s: %s", q_id, stage.name, time.monotonic() - started, result.said)
