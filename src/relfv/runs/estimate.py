"""Estimate how long a run will take, and how much memory and disk, from one q_id that is run for it in a temporary
folder.

That q_id goes through every stage of ``relfv run``. On a fast device all its trials do, so that what is measured is
what will happen; where that would take minutes, as few trials as fit in the time, and what grows with their number is
scaled. The first trial runs by itself: it pays for what a process does but once.
"""

from __future__ import annotations

import logging
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from relfv.report.page import write_report
from relfv.runs.plan import RunPlan
from relfv.runs.qid import run_step, work_on
from relfv.settings import Settings
from relfv.stages.stage import Stage
from relfv.stages.table import STAGES, asked_for, steps
from relfv.stages.trials import TRIALS
from relfv.stages.zeroshot import ZERO_SHOT_TRIALS, evaluated
from relfv.store.status import QidStatus

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel

log = logging.getLogger(__name__)

_PATIENCE_S = 90.0
"""Seconds that the measured q_id may take."""
_PAGES_SHARE = 0.1
"""Largest share of the time that goes into pages while a run goes on (runs/run.py)."""


@dataclass(frozen=True)
class Costs:
    """Time, disk and memory that one q_id took on its way through the stages."""

    n_trials: int
    n_eval: int
    seconds: dict[str, float]
    """Seconds by stage; for stages with a step for each layer, all layers together."""
    n_bytes: dict[str, int]
    """Bytes of the files of each stage."""
    n_files: int
    page_s: float
    peak_bytes: int
    """Peak of the device's memory in bytes, the model's included."""

    @property
    def total_s(self) -> float:
        return sum(self.seconds.values())


@dataclass(frozen=True)
class Estimate:
    """Estimate for a whole run, all its q_ids together."""

    measured: Costs
    q_id: str
    seconds: float
    seconds_opening: float
    seconds_per_q_id: float
    peak_bytes: int
    device_bytes: int | None
    """Memory of the GPU in bytes; None on the host."""
    disk_bytes: int
    n_files: int


def estimate(
    plan: RunPlan,
    model: LanguageModel,
    n_eval: Mapping[str, int],
    stages: Mapping[str, AbstractSet[str]],
    opening_s: float,
) -> Estimate:
    """Estimate the run of the q_ids in ``n_eval``, which maps each to the number of prompts that Step6 evaluates;
    ``stages`` has those that each still has to run, and ``opening_s`` the seconds spent until the model was open.
    Exceptions of a stage pass through."""
    settings = plan.request.settings
    n_trials = settings.n_trials_per_q
    q_id = sorted(n_eval, key=lambda one: n_eval[one])[len(n_eval) // 2]
    opened_bytes, device_bytes = peak_bytes(model), _device_bytes(model)
    first = measure(plan, model, q_id, 1)
    again = measure(plan, model, q_id, 1) if first.total_s < _PATIENCE_S / 10 else first
    share = min(1.0, _PATIENCE_S / _scaled(again, again.seconds, settings, n_eval[q_id]))
    n = max(2, int(n_trials * share)) if again.total_s < _PATIENCE_S else 1
    found = measure(plan, model, q_id, min(n, n_trials)) if n > 1 else again

    def in_all(amounts: Mapping[str, float]) -> float:
        still = [({name: amounts[name] for name in stages[one] & amounts.keys()}, n_eval[one]) for one in n_eval]
        return sum(_scaled(found, of_stages, settings, count) for of_stages, count in still)

    together = in_all(found.seconds)
    seconds = opening_s + max(0.0, first.total_s - again.total_s) + together
    seconds += found.page_s + min(found.page_s * len(n_eval), _PAGES_SHARE * together)
    above = (found.peak_bytes - opened_bytes) * n_trials // found.n_trials
    return Estimate(
        measured=found,
        q_id=q_id,
        seconds=seconds,
        seconds_opening=opening_s,
        seconds_per_q_id=together / len(n_eval),
        peak_bytes=min(opened_bytes + above, device_bytes or opened_bytes + above),
        device_bytes=device_bytes,
        disk_bytes=int(in_all(found.n_bytes)),
        n_files=found.n_files * len(n_eval),
    )


def _scaled(found: Costs, of_stages: Mapping[str, float], settings: Settings, n_eval: int) -> float:
    """Scale the measured amounts of the stages to a q_id with these settings and so many evaluated prompts, and sum
    them."""
    by_name = {stage.name: stage for stage in STAGES}
    return sum(amount * times_as_much(by_name[name], found, settings, n_eval) for name, amount in of_stages.items())


def times_as_much(stage: Stage, found: Costs, settings: Settings, n_eval: int) -> float:
    """Work of a stage with these settings and so many evaluated prompts, as a multiple of its work when it was
    measured."""
    if stage.prompts:
        return stage.prompts(settings) / stage.prompts(replace(settings, n_trials_per_q=found.n_trials))
    if ZERO_SHOT_TRIALS in stage.reads:
        return n_eval / found.n_eval
    return settings.n_trials_per_q / found.n_trials if TRIALS in (*stage.reads, *stage.writes) else 1.0


def measure(plan: RunPlan, model: LanguageModel, q_id: str, n_trials: int) -> Costs:
    """Run ``q_id`` with ``n_trials`` of its trials in a temporary folder that is gone afterwards."""
    asked = replace(plan.request.settings, n_trials_per_q=n_trials)
    log.info("measuring on %s with %d of %d trials", q_id, n_trials, plan.request.settings.n_trials_per_q)
    with TemporaryDirectory() as folder, _in_silence():
        there = replace(plan, folder=Path(folder) / "relation", request=replace(plan.request, settings=asked))
        status = there.new_status(q_id)
        status.expected_layers = list(range(model.arch.n_layers))
        work = work_on(status, lambda: model, relation=plan.relations[q_id], csv_sha256=plan.csv_sha256)
        wanted = steps(status.expected_layers, extras=asked.has_extras)
        seconds: dict[str, float] = {}
        _begin_peak(model)
        for step in [*wanted, *(stage.step() for stage in asked_for(asked))]:
            work.settings = asked if step.stage.asked else status.settings
            began = time.monotonic()
            run_step(work, step, status, write=False)
            seconds[step.stage.name] = seconds.get(step.stage.name, 0.0) + time.monotonic() - began
        status.set("completed")
        began = time.monotonic()
        write_report(there.folder)
        page_s = time.monotonic() - began
        return Costs(
            n_trials,
            len(work.once(evaluated).questions),
            seconds,
            _bytes_of_stages(status),
            sum(path.is_file() for path in status.artifacts_dir.rglob("*")) + 1,  # and the q_id's log
            page_s,
            peak_bytes(model),
        )


@contextmanager
def _in_silence() -> Iterator[None]:
    """While open, hide the stages' log lines, since what they find in few trials is no result."""
    loggers = [logging.getLogger(name) for name in ("relfv.runs.qid", "relfv.stages.trials")]
    for logger in loggers:
        logger.addFilter(_hidden)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(_hidden)


def _hidden(_: logging.LogRecord) -> bool:
    return False


def _bytes_of_stages(status: QidStatus) -> dict[str, int]:
    found: dict[str, int] = {}
    for stage in STAGES:
        for name, record in status.stages.items():
            if name == stage.name or (stage.per_layer and name.startswith(stage.name)):
                sizes = [(status.artifacts_dir / file).stat().st_size for file in record.files]
                found[stage.name] = found.get(stage.name, 0) + sum(sizes)
    return found


# --- memory --------------------------------------------------------------------------------------------------------


def _begin_peak(model: LanguageModel) -> None:
    if model.backbone.device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(model.backbone.device)


def peak_bytes(model: LanguageModel) -> int:
    """Most bytes of the device's memory that the process has had: of a GPU since ``_begin_peak``, of the host ever."""
    if model.backbone.device.type == "cuda":
        import torch

        return torch.cuda.max_memory_reserved(model.backbone.device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _device_bytes(model: LanguageModel) -> int | None:
    if model.backbone.device.type != "cuda":
        return None
    import torch

    return torch.cuda.get_device_properties(model.backbone.device).total_memory
