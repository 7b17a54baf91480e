"""``--reuse_stepd``: StepD's files of other results taken into a new folder, where its settings are the same.

Trials, mean activations and head effects do not depend on how many heads are chosen, how strongly their vector is added
and on how many prompts. What is taken must be whole: every file with the hash that its own status promises. It is
copied, so that neither folder depends on the other.
"""

from __future__ import annotations

import logging
from itertools import groupby
from pathlib import Path

from relfv.errors import InputError, RelfvError
from relfv.relations import named
from relfv.runs.plan import STEP_D_FIELDS, RunPlan
from relfv.stages.table import STEP_D
from relfv.stages.trials import TRIALS
from relfv.store.files import read_bytes, sha256_bytes, write_together
from relfv.store.status import QidStatus, StageRecord, read_status

log = logging.getLogger(__name__)


def require_reusable(plan: RunPlan) -> None:
    """Raise InputError if StepD of a q_id in the results to reuse was made with other settings, naming them, or if
    there is none of the q_ids, or that folder is the one that is written to. Without ``--reuse_stepd`` all is fine."""
    there, here = plan.request.reuse_stepd, plan.folder
    if there is None:
        return
    found = {q_id: status for q_id in plan.relations if (status := _status_there(plan, q_id))}
    if not found:
        raise InputError(
            f"--reuse_stepd {there}: has no results of {named(list(plan.relations))}; expected earlier ones"
        )
    if any(status.artifacts_dir.resolve() == plan.artifacts_dir(q_id).resolve() for q_id, status in found.items()):
        raise InputError(
            f"--reuse_stepd {there}: is where {here} lies; expected other results, so give another --out_root"
        )
    differing = {q_id: words for q_id, status in found.items() if (words := plan.differences(status, STEP_D_FIELDS))}
    if differing:
        said = named([f"{q_id} ({', '.join(words)})" for q_id, words in differing.items()], "; ")
        raise InputError(
            f"--reuse_stepd {there}: its StepD is of another experiment: {said}; expected the same settings but for "
            "those that StepD does not use (topk, alpha, n_eval, ...), so leave this flag out"
        )


def reuse_step_d(plan: RunPlan, status: QidStatus) -> None:
    """Copy StepD's files of ``status``' q_id into its folder, and their record into its status, where they are there
    and whole. Hold the q_id's lock."""
    if plan.request.reuse_stepd is None or status.has_results():
        return
    source = _status_there(plan, status.q_id)
    if source is None or not all(source.intact(stage.name) for stage in STEP_D):
        log.info("%s: %s has no whole StepD of it, which is computed here", status.q_id, plan.request.reuse_stepd)
        return
    records = {stage.name: source.stages[stage.name] for stage in STEP_D}
    hashes = {name: digest for record in records.values() for name, digest in record.files.items()}
    contents = {name: read_bytes(source.artifacts_dir / name) for name in hashes}
    if any(sha256_bytes(data) != hashes[name] for name, data in contents.items()):
        raise InputError(f"--reuse_stepd {source.artifacts_dir}: is being changed; run again when that has ended")
    trials = contents.pop(TRIALS.name)
    write_together({status.artifacts_dir / TRIALS.name: trials}, read_only=True)
    for _, names in groupby(sorted(contents, key=_folder), key=_folder):
        write_together({status.artifacts_dir / name: contents[name] for name in names})
    status.expected_layers = list(source.expected_layers)
    status.trials_per_pass |= {kind: n for kind, n in source.trials_per_pass.items() if kind.startswith("stepD")}
    status.stages |= {name: StageRecord(**vars(record)) for name, record in records.items()}
    status.reused_stepd = str(source.artifacts_dir)
    status.write()
    log.info("%s: StepD is that of %s", status.q_id, source.artifacts_dir)


def _status_there(plan: RunPlan, q_id: str) -> QidStatus | None:
    """Status of the q_id in the results to reuse, which are all results or one relation's. Raises InputError if
    damaged."""
    there = plan.request.reuse_stepd
    assert there is not None
    try:
        found = (read_status(folder / q_id / "artifacts") for folder in (there / plan.folder.name, there))
        status = next((status for status in found if status), None)
    except RelfvError as problem:
        raise InputError(f"--reuse_stepd: {problem}") from None
    return status if status and status.has_results() else None


def _folder(name: str) -> Path:
    return Path(name).parent
