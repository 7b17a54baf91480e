"""``relfv run --dry_run``: what a run would do, and what it would refuse, with nothing written and no weights read."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from relfv.errors import InputError, RelfvError
from relfv.logs import printable, show
from relfv.runs.plan import Plan
from relfv.runs.qid import has_extras, require_frozen_trials
from relfv.settings import Settings
from relfv.stages.cie import heads_to_sweep
from relfv.stages.table import is_complete
from relfv.store.files import require_temporary_folder
from relfv.store.status import DamagedStatus

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel
    from relfv.models.outline import Outline

_REFUSED = "refuse: "


def rehearse(plan: Plan) -> int:
    """A line for each q_id on stdout. Returns the exit code: 2 if the run would refuse any of them.

    Raises InputError where it would not even begin: a device that is not there, more heads asked for than there are.
    """
    settings = plan.request.settings
    lines = [
        f"output  {plan.folder}",
        f"model   {settings.model} ({plan.model_identity[:40]})",
        *(f"departs from the spec: {departure}" for departure in settings.departures()),
    ]
    would = {q_id: _what_would_happen(plan, q_id) for q_id in plan.relations}
    if any(not said.startswith(("skip: ", "completed, nothing", _REFUSED)) for said in would.values()):
        found = _require_model(settings)
        if found and found.placement:
            lines.insert(2, f"weights {found.placement}")
    rows = {q_id: len(relation.pairs) for q_id, relation in plan.relations.items()}
    show("\n".join(map(printable, [*lines, *(f"{q_id:<8} {rows[q_id]:>4} rows  {would[q_id]}" for q_id in would)])))
    return 2 if any(said.startswith(_REFUSED) for said in would.values()) else 0


def require_enough_heads(model: LanguageModel | Outline, settings: Settings) -> None:
    """Raise InputError if more heads are asked for than the model has."""
    n_heads = len(heads_to_sweep(cast("LanguageModel", model), settings))  # which asks for no more than an outline has
    for flag, k in (("--topk", settings.topk), *(("--k_sweep", k) for k in settings.k_sweep)):
        if k > n_heads:
            raise InputError(f"{flag} {k}: {model.name} has {n_heads} heads to choose from; expected at most that")


def _require_model(settings: Settings) -> Outline | None:
    require_temporary_folder()
    from relfv.models.outline import outline

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
    if found:
        require_enough_heads(found, settings)
    return found


def _what_would_happen(plan: Plan, q_id: str) -> str:
    try:
        if reason := plan.skip_reason(q_id):
            return f"skip: {reason}"
        if plan.request.force and (plan.folder / q_id).exists():
            return "move the earlier results aside, then run"
        status = plan.status_with_results(q_id)
        if status is None:
            return "run (new)"
        if differing := plan.differences(status):
            return f"{_REFUSED}{', '.join(differing)}"
        require_frozen_trials(status)
    except DamagedStatus as problem:
        return f"move the earlier results aside, then run: {problem}"
    except RelfvError as problem:
        return f"{_REFUSED}{problem}"
    if plan.is_done(status):
        return "completed, nothing to do"
    if status.status == "completed" and is_complete(status):
        return f"completed, {'sweeps' if has_extras(status, plan.request.settings) else 'extras'} to be added"
    return f"run (now {status.status})"
