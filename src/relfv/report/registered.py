"""Compare a plan that was registered before a run (``plan.json`` beside the q_ids) with the results: which hypotheses
held, whether the layer rule and the exclusions were followed, and which results existed before or were made
differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal

from relfv.errors import RelfvError
from relfv.fingerprints import differences
from relfv.relations import named
from relfv.schemas import ARTIFACTS
from relfv.stages.aggregate import AGGREGATE, read_aggregate
from relfv.stages.answers import ANSWERS
from relfv.stages.cross import CROSS
from relfv.stages.new_queries import NEW_QUERIES
from relfv.stages.replicates import REPLICATES
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.stages.summary import SUMMARY
from relfv.stages.sweeps import SWEEPS_FILE
from relfv.stages.table import makers
from relfv.stages.verdict import HELD_OUT
from relfv.store.folder import File
from relfv.store.formats import read_json, unsealed
from relfv.store.status import QidStatus

PLAN = "plan.json"
"""Name of the plan's file, beside the q_ids' folders."""
OF_ALL = (AGGREGATE, CROSS)
"""Files about all q_ids together that a hypothesis may name; the hypothesis is then about no single q_id."""

State = Literal["held", "did not hold", "cannot be told", "cannot be told yet"]

_BEST, _OTHERS = "best", "held_out"
_AT_BEST = {
    SUMMARY: {"p", "acc", "share_of_gap", "share_of_gap_of_draws", "against_random", "carriers", "layer",
              "share_of_hidden", "whole_answers"},
    STEP6_SUMMARY: {"best_layer", "best_score"},
    ANSWERS: {"layer", "summary", "rows"},
    SWEEPS_FILE: {"alpha", "alpha_relative", "k"},
    REPLICATES: {"curve"},
}  # fmt: skip
"""Values, by file, that are measured at the layer that is best on the very prompts they are measured on."""


@cache
def files_of_a_qid() -> dict[str, File[Any]]:
    """JSON files that a hypothesis may name, by name: those of a q_id that have a schema and are not written for each
    layer."""
    files = {Path(file.name).name: file for file in makers() if not file.per_layer}
    return {name: file for name, file in files.items() if name in ARTIFACTS and name.endswith(".json")}


def registered_in(folder: Path) -> dict[str, Any] | None:
    """Read the plan that was registered for a relation's ``folder``, without its own hash; None if none was. Raises
    RunError for one that is not as it was registered."""
    path = folder / PLAN
    if not path.exists():
        return None
    stat = path.stat()
    return _read(path, (stat.st_ino, stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=16)
def _read(path: Path, _: tuple[int, ...]) -> dict[str, Any]:
    content = read_json(path)
    return unsealed(content if isinstance(content, dict) else {}, path)


def excluded_in(folder: Path) -> dict[str, str]:
    """Reasons why the registered plan excludes q_ids, by q_id. Raises as ``registered_in``."""
    return (registered_in(folder) or {}).get("exclusions", {})


# --- the layer rule --------------------------------------------------------------------------------------------------


def layer_of(name: str, path: Sequence[str | int]) -> str | int | None:
    """Rule that chose the layer at which a value of an artifact is measured: ``held_out`` (chosen by other queries than
    those it is measured on), ``best`` (by the same queries), or a layer's number; None for a value without a layer."""
    keys = [*map(str, path)]
    if "per_layer" in keys[:-1]:
        layer = keys[keys.index("per_layer") + 1]
        return int(layer) if layer.isdecimal() else None
    if any(key in ("zero_shot", "clean") or "in_place" in key for key in keys):
        return None
    file = files_of_a_qid().get(name)
    if any(key.endswith(HELD_OUT.partition(", ")[2]) for key in keys) or file is NEW_QUERIES:
        return _OTHERS
    return _BEST if file and keys[0] in _AT_BEST.get(file, ()) else None


def rule_in_words(rule: str | int) -> str:
    """Describe a rule in words: the plan's ``layer_rule``, or a result of ``layer_of``."""
    words = {_OTHERS: "the layer that other queries choose", _BEST: "the best layer on the same prompts"}
    return words.get(str(rule), f"layer {rule}")


# --- hypotheses ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """Result of one hypothesis in one q_id, or in a file about all q_ids."""

    q_id: str
    """The q_id; empty where the file is about all of them."""
    state: State
    said: str
    """The value that was found, or why there is none."""


@dataclass(frozen=True)
class Judged:
    """One hypothesis with all its outcomes."""

    name: str
    """Name of the hypothesis: H1, H2, ... in the plan's order."""
    says: str
    where: str
    expected: str
    outcomes: tuple[Outcome, ...]
    n_needed: int
    """Number of outcomes in which the hypothesis has to hold."""
    layer: str | int | None
    """The layer rule of its value; see ``layer_of``."""
    is_prediction: bool
    """True if none of the results that the hypothesis is about was there when the plan was registered."""

    @property
    def n_held(self) -> int:
        """Number of outcomes in which the hypothesis held."""
        return sum(one.state == "held" for one in self.outcomes)

    @property
    def state(self) -> State:
        """State of all outcomes together. An outcome that cannot be told may turn either way."""
        states = [one.state for one in self.outcomes]
        if not states:
            return "cannot be told"
        if self.n_held >= self.n_needed:
            return "held"
        if len(states) - states.count("did not hold") < self.n_needed:
            return "did not hold"
        return "cannot be told yet" if "cannot be told yet" in states else "cannot be told"


def judged(folder: Path, plan: Mapping[str, Any], statuses: Mapping[str, QidStatus]) -> list[Judged]:
    """Judge every hypothesis of ``plan``; ``statuses`` are those of the q_ids that can be read."""
    before = seen_before(plan, statuses)
    return [_judge(folder, plan, number, statuses, before) for number in range(len(plan.get("hypotheses", [])))]


def judged_in(plan: Mapping[str, Any], status: QidStatus) -> list[tuple[str, str, Outcome]]:
    """The hypotheses that are about one q_id: name, expected value, and what was found in it."""
    if status.q_id in plan.get("exclusions", {}):
        return []
    return [
        (f"H{number}", _expected(one), _of_qid(one, status.q_id, status))
        for number, one in enumerate(plan.get("hypotheses", []), start=1)
        if one["file"] not in OF_ALL and status.q_id in one.get("q_ids", plan["registered"]["rows_sha256"])
    ]


def _judge(
    folder: Path,
    plan: Mapping[str, Any],
    number: int,
    statuses: Mapping[str, QidStatus],
    before: Mapping[str, str],
) -> Judged:
    hypothesis = plan["hypotheses"][number]
    name, path = hypothesis["file"], tuple(hypothesis["value"])
    if name in OF_ALL:
        there = (folder / name).exists()
        outcomes = (_outcome(hypothesis, "", folder / name if there else None, "the file is not there"),)
    else:
        q_ids = _q_ids_of(plan, hypothesis, statuses)
        outcomes = tuple(_of_qid(hypothesis, q_id, statuses.get(q_id)) for q_id in q_ids)
    n_needed = hypothesis.get("in_at_least", len(outcomes))
    about = [one.q_id for one in outcomes if one.q_id] or [*plan["registered"]["rows_sha256"]]
    return Judged(
        name=f"H{number + 1}",
        says=hypothesis["says"],
        where=f"{name}: {' → '.join(map(str, path))}",
        expected=_expected(hypothesis),
        outcomes=outcomes,
        n_needed=n_needed,
        layer=layer_of(name, path),
        is_prediction=not any(q_id in before for q_id in about),
    )


def _q_ids_of(plan: Mapping[str, Any], hypothesis: Mapping[str, Any], statuses: Mapping[str, QidStatus]) -> list[str]:
    """The q_ids that a hypothesis names, or else every one of the CSV that is not excluded, whether it is run or not: a
    claim about all q_ids does not shrink with --q_list. A claim about all of them leaves out those that cannot run:
    that they have too few rows, or too long prompts, is known without results."""
    if "q_ids" in hypothesis:
        return hypothesis["q_ids"]
    every = [q_id for q_id in plan["registered"]["rows_sha256"] if q_id not in plan.get("exclusions", {})]
    if "in_at_least" in hypothesis:
        return every
    return [q_id for q_id in every if q_id not in statuses or statuses[q_id].status != "skipped"]


def _of_qid(hypothesis: Mapping[str, Any], q_id: str, status: QidStatus | None) -> Outcome:
    if status is None:
        return Outcome(q_id, "cannot be told yet", "not run")
    if status.status != "completed":
        never = status.status == "skipped"
        state: State = "cannot be told" if never else "cannot be told yet"
        return Outcome(q_id, state, f"{status.status}: {status.reason}" if status.reason else status.status)
    path = status.artifacts_dir / files_of_a_qid()[hypothesis["file"]].name
    return _outcome(hypothesis, q_id, path if path.exists() else None, f"{path.name} is not there")


def _outcome(hypothesis: Mapping[str, Any], q_id: str, path: Path | None, why_none: str) -> Outcome:
    if path is None:
        return Outcome(q_id, "cannot be told yet", why_none)
    try:
        value = value_at(path, tuple(hypothesis["value"]))
    except (LookupError, OSError, RelfvError) as problem:
        return Outcome(q_id, "cannot be told", str(problem.args[0] if problem.args else problem))
    if value is None:
        return Outcome(q_id, "cannot be told", "null: relfv claims no number here")
    said = f"{value:.4g}" if isinstance(value, float) else str(value)
    try:
        return Outcome(q_id, "held" if _holds(hypothesis, value) else "did not hold", said)
    except TypeError:
        return Outcome(q_id, "cannot be told", f"{said[:40]!r} is no number")


def value_at(path: Path, keys: tuple[str | int, ...]) -> Any:
    """Read the value at ``keys`` in a JSON file: once, since a run writes its page again and again. Raises LookupError,
    in words, where nothing is; OSError and RelfvError as readers do."""
    stat = path.stat()
    return _value(path, keys, (stat.st_ino, stat.st_mtime_ns, stat.st_size))


@lru_cache(maxsize=1 << 16)
def _value(path: Path, keys: tuple[str | int, ...], _: tuple[int, ...]) -> Any:
    here = read_json(path)
    for key in keys:
        try:
            here = here[key if isinstance(here, list) else str(key)]
        except (LookupError, TypeError):
            there = f"; there is {named(list(here))}" if isinstance(here, dict) else ""
            raise LookupError(f"{path.name} has no {key!r} there{there}") from None
    return here


def _holds(hypothesis: Mapping[str, Any], value: Any) -> bool:
    wanted = hypothesis.get("equals", value)
    return (
        value >= hypothesis.get("at_least", value)
        and value <= hypothesis.get("at_most", value)
        and value == wanted
        and isinstance(value, bool) == isinstance(wanted, bool)
    )


def _expected(hypothesis: Mapping[str, Any]) -> str:
    names = ("at_least", "at_most", "equals")
    return " and ".join(f"{name.replace('_', ' ')} {hypothesis[name]}" for name in names if name in hypothesis)


# --- was it followed? ------------------------------------------------------------------------------------------------


def changed_since(plan: Mapping[str, Any], status: QidStatus) -> list[str]:
    """List how the settings, rows or model of a q_id's results differ from those that the plan was registered with."""
    registered = plan["registered"]
    there = {**registered["fingerprint_fields"], "rows_sha256": registered["rows_sha256"].get(status.q_id)}
    models = registered["model"], status.settings.model
    return differences(there, status.fingerprint_fields, status.q_id, models=models)


def seen_before(plan: Mapping[str, Any], statuses: Mapping[str, QidStatus]) -> dict[str, str]:
    """For each q_id with results that may have been known when the plan was registered: which ones."""
    there = dict.fromkeys(plan["registered"]["results_before"], "results were there when the plan was registered")
    reused = {q_id: f"StepD was taken from {of.reused_stepd}" for q_id, of in statuses.items() if of.reused_stepd}
    return {**reused, **there}


def exclusions_not_followed(folder: Path, plan: Mapping[str, Any], statuses: Mapping[str, QidStatus]) -> list[str]:
    """List the q_ids that ``relfv aggregate`` counted although the plan excludes them, or left out although it does
    not."""
    try:
        counted = read_aggregate(folder)["relations"]
    except RelfvError:
        return []
    excluded = plan.get("exclusions", {})
    said = [f"{AGGREGATE} counts {q_id}" for q_id in excluded if q_id in counted and counted[q_id]["included"]]
    finished = [q_id for q_id, status in statuses.items() if status.status == "completed"]
    others = [q_id for q_id in finished if q_id not in excluded and q_id not in counted]
    return said + ([f"{AGGREGATE} lacks {named(others)}, which the plan does not exclude"] if others else [])
