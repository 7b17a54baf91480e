"""Rehearse ``relfv run``: what it would do with each q_id, and what it would refuse, with nothing written and no
weights read."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, cast

from relfv.errors import InputError, RelfvError
from relfv.models.memory import share_cards
from relfv.runs.plan import RunPlan, RunRequest
from relfv.runs.qid import has_extras, missing_requests, require_frozen_trials, with_extras_of
from relfv.settings import Settings
from relfv.stages.cie import heads_to_sweep
from relfv.stages.table import STEP_D, asked_for, is_complete, not_done, steps
from relfv.store.status import DamagedStatus

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel
    from relfv.models.outline import Outline

_MOST, _CORES = 4, 4
"""Most processes on a card that were found to pay, and host cores for each."""
_WORTH = 30
"""Number of q_ids that make up for opening the model more often: that takes 10 to 15 s longer, and a q_id 0.4 to 0.5 s
less."""
REFUSED, SKIPPED, _DONE = "refuse: ", "skip: ", "completed, nothing to do"


def require_enough_heads(model: LanguageModel | Outline, settings: Settings) -> None:
    """Raise InputError if more heads are asked for than the model has."""
    n_heads = len(heads_to_sweep(cast("LanguageModel", model), settings))  # needs only an outline
    for flag, k in (("--topk", settings.topk), *(("--k_sweep", k) for k in settings.k_sweep)):
        if k > n_heads:
            raise InputError(f"{flag} {k}: {model.name} has {n_heads} heads to choose from; expected at most that")


def outline_for(request: RunRequest) -> Outline | None:
    """The outline of the model that ``request`` names, with heads enough; None where only its weights can tell.

    Raises InputError where the run would not even begin: a device that is not there, more heads asked for than there
    are, or more processes on a card than hold its weights.
    """
    from relfv.models.outline import outline

    settings = request.settings
    share_cards(request.processes_a_card)
    try:
        found = outline(
            settings.model,
            settings.model_spec,
            revision=settings.revision,
            device=settings.device,
            dtype=settings.dtype,
            quant=settings.quant,
            offload=settings.offload,
            trust_remote_code=settings.trust_remote_code,
        )
    finally:
        share_cards(1)
    if found:
        require_enough_heads(found, settings)
    return found


def more_on_a_card(request: RunRequest, found: Outline | None, n_q_ids: int) -> str:
    """Advice for a user of one process on a card where more would pay: each has room for the weights and a pass over
    all trials, so that every byte is that of one process. Empty if there is none to give."""
    if (
        request.devices
        or request.ray
        or n_q_ids < _WORTH
        or found is None
        or found.placement is None
        or found.placement.streams
    ):
        return ""  # without a card nothing is placed
    from relfv.models.devices import choose_device
    from relfv.models.placement import bytes_of_prompt, card_bytes

    settings, device = request.settings, choose_device(request.settings.device)
    one_prompt = bytes_of_prompt(found.arch, len(heads_to_sweep(cast("LanguageModel", found), settings)))
    needed = found.placement.card_bytes + settings.n_trials_per_q * one_prompt
    try:
        for n in range(min(_MOST, len(os.sched_getaffinity(0)) // _CORES), 1, -1):
            share_cards(n)
            if (card_bytes(device, found.arch) or 0) >= needed:
                return (
                    f"{device} has room for {n} processes, which write the same bytes: once they have the model open, "
                    "--per_card 2 is 1.2 times as fast at 8B, --per_card 4 four times with a small one "
                    "(docs/several_cards.md)"
                )
    finally:
        share_cards(1)
    return ""


def needs_a_model(said: str) -> bool:
    """Whether a run would compute anything for a q_id of which ``what_would_happen`` said this."""
    return not said.startswith((SKIPPED, _DONE, REFUSED))


def stages_to_run(plan: RunPlan, q_id: str) -> frozenset[str]:
    """Names of the stages that a run would go through for a q_id that it would not refuse."""
    asked, status = plan.request.settings, None
    if not plan.request.force:
        with suppress(DamagedStatus):
            status = plan.status_with_results(q_id)
    if status is None:
        begun = {stage.name for stage in STEP_D} if plan.request.reuse_stepd else set()
        wanted = {step.stage.name for step in steps([0], extras=asked.has_extras)} - begun
    else:
        status.settings = with_extras_of(status, asked)
        wanted = {step.stage.name for step in not_done(status)}
    requested = asked_for(asked) if status is None else missing_requests(status, asked, plan.relations[q_id])
    return frozenset({*wanted, *(stage.name for stage in requested)})


def what_would_happen(plan: RunPlan, q_id: str) -> str:
    """Say in words what a run would do with a q_id; begins with REFUSED or SKIPPED if it would refuse or skip it."""
    try:
        if reason := plan.skip_reason(q_id):
            return f"{SKIPPED}{reason}"
        if plan.request.force and (plan.folder / q_id).exists():
            return "move the earlier results aside, then run"
        status = plan.status_with_results(q_id)
        if status is None:
            reused = plan.request.reuse_stepd
            return f"run (new), StepD from {reused} where it is whole" if reused else "run (new)"
        if differing := plan.differences(status):
            return f"{REFUSED}{', '.join(differing)}"
        require_frozen_trials(status)
    except DamagedStatus as problem:
        return f"move the earlier results aside, then run: {problem}"
    except RelfvError as problem:
        return f"{REFUSED}{problem}"
    if plan.is_done(status):
        return _DONE
    if status.status == "completed" and is_complete(status):
        extras = [] if has_extras(status, plan.request.settings) else ["extras"]
        missing = missing_requests(status, plan.request.settings, plan.relations[q_id])
        requested = [stage.name.removeprefix("step6_") for stage in missing]
        return f"completed, {', '.join([*extras, *requested]) or 'figures'} to be added"
    return f"run (now {status.status})"
