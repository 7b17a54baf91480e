"""Text about a registered plan, for pages and ``relfv status``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args

from relfv.errors import RelfvError
from relfv.relations import named
from relfv.report.registered import (
    PLAN,
    Judged,
    State,
    changed_since,
    exclusions_not_followed,
    judged,
    judged_in,
    registered_in,
    rule_in_words,
    seen_before,
    value_at,
)
from relfv.stages.summary import SUMMARY
from relfv.stages.verdict import HELD_OUT
from relfv.store.folder import is_of_a_qid, was_moved_aside
from relfv.store.status import QidStatus


def plan_section(folder: Path, statuses: Sequence[QidStatus]) -> dict[str, Any] | None:
    """Content about the plan for the page of a relation's ``folder``; None where no plan was registered."""
    try:
        plan = registered_in(folder)
    except RelfvError as problem:
        return {"damaged": str(problem)}
    if plan is None:
        return None
    by_q_id = {status.q_id: status for status in statuses}
    found, registered = judged(folder, plan, by_q_id), plan["registered"]
    changed: dict[str, list[str]] = {}
    for status in statuses:
        if different := changed_since(plan, status):
            changed.setdefault("; ".join(different), []).append(status.q_id)
    return {
        "damaged": "",
        "at": _at(plan),
        "analyst": plan.get("analyst", ""),
        "notes": plan.get("notes", ""),
        "sha256": registered["plan_sha256"],
        "file": f"../{PLAN}",
        "before": [(named(q_ids), why) for why, q_ids in _by_value(seen_before(plan, by_q_id)).items()],
        "changed": [(named(q_ids), what) for what, q_ids in changed.items()],
        "aside": named(
            sorted(path.name for path in folder.iterdir() if was_moved_aside(path.name) and is_of_a_qid(path))
        ),
        "rule": _rule(plan, found, statuses),
        "exclusions": plan.get("exclusions", {}),
        "not_followed": exclusions_not_followed(folder, plan, by_q_id),
        "counted": counted(found),
        "hypotheses": [
            {**vars(one), "n_held": one.n_held, "state": one.state, "layer": _layer(one), "found": _found(one)}
            for one in found
        ],
    }


def plan_of_qid(folder: Path, status: QidStatus) -> dict[str, Any] | None:
    """Content about the plan for the section of a completed q_id; None where no plan was registered, or where it was
    changed since."""
    try:
        plan = registered_in(folder)
    except RelfvError:
        return None
    if plan is None:
        return None
    return {
        "excluded": plan.get("exclusions", {}).get(status.q_id, ""),
        "before": seen_before(plan, {status.q_id: status}).get(status.q_id, ""),
        "changed": changed_since(plan, status),
        "outcomes": judged_in(plan, status),
    }


def plan_line(folder: Path, statuses: Sequence[QidStatus]) -> str:
    """Line about the plan for ``relfv status``; empty where no plan was registered."""
    try:
        plan = registered_in(folder)
    except RelfvError as problem:
        return str(problem)
    if plan is None:
        return ""
    before = named(plan["registered"]["results_before"])
    when = f"after results of {before}" if before else "before any result"
    said = counted(judged(folder, plan, {status.q_id: status for status in statuses}))
    return f"{folder.resolve().name}: plan registered {_at(plan)}, {when}" + (f"; {said}" if said else "")


def told_of_plan(folder: Path) -> str:
    """Text that changes when the plan does: the section of a q_id depends on it besides its own files."""
    try:
        plan = registered_in(folder)
    except RelfvError as problem:
        return str(problem)
    return f"{plan['registered']['at']} {plan['registered']['plan_sha256']}" if plan else ""


def counted(found: Sequence[Judged]) -> str:
    """Count, in words, the hypotheses that held and did not, and those that are no predictions; empty where there are
    none."""
    states = [one.state for one in found]
    others = [f"{states.count(state)} {state}" for state in get_args(State)[1:] if state in states]
    said = ", ".join([f"{states.count('held')} of {len(states)} hypotheses held", *others])
    n_late = sum(not one.is_prediction for one in found)
    late = f"; {n_late} of them, on results that were there before, are no predictions" if n_late else ""
    return said + late if states else ""


def _at(plan: Mapping[str, Any]) -> str:
    return plan["registered"]["at"][:19].replace("T", " ") + " UTC"


def _by_value(of: Mapping[str, str]) -> dict[str, list[str]]:
    return {value: [key for key in of if of[key] == value] for value in dict.fromkeys(of.values())}


def _found(of: Judged) -> dict[str, str]:
    """The q_ids of a hypothesis: by outcome, with their values; those without a value by the reason."""
    kinds: dict[str, list[str]] = {"held": [], "did not hold": []}
    for one in of.outcomes:
        told = one.state in kinds
        kinds.setdefault(one.state if told else one.said, []).append(
            f"{one.q_id}: {one.said}".removeprefix(": ") if told else one.q_id
        )
    return {kind: named(said, "; " if kind in get_args(State) else ", ") for kind, said in kinds.items() if said}


def _layer(one: Judged) -> str:
    return "" if one.layer is None else rule_in_words(one.layer)


def _rule(plan: Mapping[str, Any], found: Sequence[Judged], statuses: Sequence[QidStatus]) -> dict[str, Any] | None:
    """The layer rule in words, which hypotheses are measured at another layer, and where the verdict of a q_id is."""
    rule = plan.get("layer_rule")
    if rule is None:
        return None
    counted_in = [of for of in statuses if of.status == "completed" and of.q_id not in plan.get("exclusions", {})]
    keys, said = ("layer",), "the verdict is at another layer, the best on its own prompts"
    if rule == "held_out":
        keys, said = ("share_of_gap", HELD_OUT), "no held-out share can be said"
    elsewhere = []
    for status in counted_in:
        at: Any = None
        with suppress(LookupError, OSError, RelfvError):
            at = value_at(status.artifacts_dir / SUMMARY.name, keys)
        if at is None or (isinstance(rule, int) and at != rule):
            elsewhere.append(status.q_id)
    at_a_layer = [one for one in found if one.layer is not None]
    return {
        "words": rule_in_words(rule),
        "n": len(at_a_layer),
        "others": [one for one in at_a_layer if one.layer != rule],
        "elsewhere": f"{said}: {named(elsewhere)}" if elsewhere else "",
    }
