"""``relfv run --plan``: write down what is to be shown, and seal it before anything is computed.

The plan is checked before the model is opened: its q_ids against the CSV, its values against the artifacts' schemas.
It is copied into ``<REL>/plan.json`` once, with what was known then, and never replaced. Whether it was followed the
page says (report/registered.py).
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relfv import __version__
from relfv.errors import InputError, RelfvError
from relfv.fingerprints import fingerprint, fingerprint_fields
from relfv.relations import csv_file, load_relations, named, require_q_ids, rows_sha256
from relfv.report.registered import OF_ALL, PLAN, files_of_a_qid, layer_of, registered_in
from relfv.requests import without_requests
from relfv.schemas.paths import kinds_at
from relfv.schemas.plans import HYPOTHESIS, LAYER_RULES, WRITTEN
from relfv.settings import Settings
from relfv.stages.table import makers
from relfv.store.files import REPLACED, read_bytes, sha256_bytes, write_atomic
from relfv.store.formats import SEAL, sealed_bytes
from relfv.store.locks import sole_writer
from relfv.store.status import now, read_status
from relfv.types import Relation

if TYPE_CHECKING:
    from relfv.runs.plan import RunPlan, RunRequest

log = logging.getLogger(__name__)

_LARGEST_FILE = 1 << 20
_KINDS = {"number": "a number", "text": "a text", "flag": "true or false"}
_TESTS = ("at_least", "at_most", "equals")


@dataclass(frozen=True)
class WrittenPlan:
    """A plan as ``--plan`` gave it, checked."""

    path: Path
    content: dict[str, Any]
    sha256: str
    """Hash of the file, as sha256sum prints it."""

    def in_words(self) -> str:
        """Summary of the plan in words."""
        n_hypotheses, n_excluded = (len(self.content.get(name, ())) for name in ("hypotheses", "exclusions"))
        return f"{self.path}: {n_hypotheses} hypotheses, {n_excluded} q_ids excluded; sha256 {self.sha256}"

    def require_layers(self, n_layers: int) -> None:
        """Raise InputError for a layer that the model does not have."""
        hypotheses = self.content.get("hypotheses", [])
        layers = {"layer_rule": self.content.get("layer_rule")}
        layers |= {f"hypothesis {n}": layer_of(of["file"], of["value"]) for n, of in enumerate(hypotheses, start=1)}
        for name, layer in layers.items():
            if isinstance(layer, int) and layer >= n_layers:
                expected = f"one of the model's, 0 to {n_layers - 1}"
                raise InputError(f"--plan {self.path}: {name}: is about layer {layer}; expected {expected}")


def to_register(request: RunRequest, csv_path: Path, folder: Path) -> WrittenPlan:
    """The plan of a request. Raises InputError if it is not good, or another is registered in ``folder``."""
    assert request.plan is not None
    written = read_plan(request.plan, load_relations(csv_path), csv_path)
    require_same_plan(written, folder)
    for number, one in enumerate(written.content.get("hypotheses", []), start=1):
        if one["file"] in files_of_a_qid() and not _is_made(one["file"], request.settings):
            said = "--plan: hypothesis %d rests on %s, which this run is not asked to make: without it (see --extras) "
            log.warning(said + "the hypothesis cannot be told", number, one["file"])
    return written


def _is_made(name: str, settings: Settings) -> bool:
    stage = makers()[files_of_a_qid()[name]]
    return bool(stage.asked(settings)) if stage.asked else settings.has_extras or not stage.extra


def read_plan(path: Path, relations: Mapping[str, Relation], csv_path: Path) -> WrittenPlan:
    """Read and check a plan about ``relations``, all of the CSV. Raises InputError, naming what is wrong."""
    where = f"--plan {path}"
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise InputError(f"{where}: is larger than 1 MiB; expected a JSON file of hypotheses")
        data = read_bytes(path)
        content = json.loads(data.decode(), parse_constant=_no_number, parse_float=_finite)
    except OSError as problem:
        raise InputError(f"{where}: cannot be read ({problem.strerror}); expected a JSON file") from None
    except (ValueError, RecursionError) as problem:
        raise InputError(f"{where}: is not JSON in UTF-8 ({problem}); expected {_words(WRITTEN)}") from None
    if isinstance(content, dict):  # a plan registered before may be registered again for another model
        content = {key: value for key, value in content.items() if key not in ("registered", SEAL)}
    _require_keys(content, WRITTEN, where)
    if not content.keys() & {"hypotheses", "layer_rule", "exclusions"}:
        raise InputError(f"{where}: says nothing that could be followed; expected hypotheses, layer_rule or exclusions")
    for name in ("notes", "analyst"):
        _require(isinstance(content.get(name, ""), str), where, name, content, "a text")
    rule, exclusions = content.get("layer_rule", 0), content.get("exclusions", {})
    is_rule = rule in LAYER_RULES or (type(rule) is int and rule >= 0)
    _require(is_rule, where, "layer_rule", content, f"{_words(LAYER_RULES)}, or the number of a layer")
    reasons = [*exclusions.values()] if isinstance(exclusions, dict) else [None]
    are_told = all(isinstance(one, str) and one.strip() for one in reasons)
    _require(are_told, where, "exclusions", content, "an object: by q_id the reason, in words")
    require_q_ids(exclusions, relations, f"{where}: exclusions", csv_path)
    if not isinstance(content.get("hypotheses", []), list):
        _require(False, where, "hypotheses", content, "a list")
    for number, one in enumerate(content.get("hypotheses", []), start=1):
        _check(one, f"{where}: hypothesis {number}", exclusions, relations, csv_path)
    return WrittenPlan(path, content, sha256_bytes(data))


def require_same_plan(written: WrittenPlan, folder: Path) -> None:
    """Raise InputError if another plan is registered in ``folder``, or what is there is none."""
    try:
        there = registered_in(folder)
    except RelfvError as problem:
        raise InputError(f"{problem}; put it back, or rename it, so that a plan can be registered here anew") from None
    if there is None:
        return
    at = there["registered"]["at"]
    differing = [name for name in WRITTEN if there.get(name) != written.content.get(name)]
    if differing:
        raise InputError(
            f"--plan {written.path}: another plan was registered in {folder / PLAN} at {at}, with other "
            f"{' and '.join(differing)}, and a plan is not replaced; go on without --plan, use another --out_root, or "
            "rename that file: a new one will name the results that are there by then"
        )


def register(plan: RunPlan, written: WrittenPlan) -> None:
    """Write ``<REL>/plan.json``, if it is not there yet. Raises InputError if another plan is there by now."""
    folder, settings = plan.folder, plan.request.settings
    csv_path = csv_file(settings.relation_csv_path)
    relations = load_relations(csv_path)  # all relations, not only those of this run
    with sole_writer(folder):
        require_same_plan(written, folder)
        if (folder / PLAN).exists():
            log.info("plan: as registered in %s", folder / PLAN)
            return
        fields = fingerprint_fields(without_requests(settings), rows_sha256="", model_identity=plan.model_identity)
        del fields["rows_sha256"]
        before = [q_id for q_id in relations if _has_results(folder, q_id)]
        registered = {
            "at": now(),
            "relfv_version": __version__,
            "plan_sha256": written.sha256,
            "csv": str(csv_path),
            "csv_sha256": plan.csv_sha256,
            "model": settings.model,
            "model_identity": plan.model_identity,
            "fingerprint": fingerprint(fields),
            "fingerprint_fields": fields,
            "rows_sha256": {q_id: rows_sha256(of, settings.corruption) for q_id, of in relations.items()},
            "results_before": before,
        }
        write_atomic(folder / PLAN, sealed_bytes({**written.content, "registered": registered}), read_only=True)
    when = f"after results of {named(before)} were there" if before else "before any result"
    log.info("plan registered in %s, %s; %s", folder / PLAN, when, written.in_words())


def _has_results(folder: Path, q_id: str) -> bool:
    """Whether results of a q_id are there, also under the names that earlier ones were moved to: whoever plans may have
    seen those."""
    for path in folder.glob(f"{q_id}*/artifacts"):
        if path.parent.name.partition(REPLACED)[0] != q_id:
            continue
        try:
            status = read_status(path)
        except RelfvError:  # a damaged status shows that results were there
            return True
        if status and status.has_results():
            return True
    return False


# --- what may be wrong -----------------------------------------------------------------------------------------------


def _check(one: Any, where: str, exclusions: Mapping[str, str], relations: Iterable[str], csv_path: Path) -> None:
    _require_keys(one, HYPOTHESIS["properties"], where)
    says, name, path = (one.get(key) for key in ("says", "file", "value"))
    _require(isinstance(says, str) and bool(says.strip()), where, "says", one, "a plain sentence")
    of_all, of_each = [*OF_ALL], [*files_of_a_qid()]
    _require(name in of_each + of_all, where, "file", one, f"one of {_words([*of_each, *of_all])}")
    are_keys = isinstance(path, list) and path and all(isinstance(key, str) or type(key) is int for key in path)
    _require(bool(are_keys), where, "value", one, "a list of keys that leads to a value")
    try:
        kinds = kinds_at(name, path)
    except LookupError as problem:
        raise InputError(f"{where}: {problem.args[0]}") from None
    _require(bool(kinds), where, "value", one, "a path that leads to a number, a text, true or false, not to more keys")
    tests = [test for test in _TESTS if test in one]
    if not tests:
        raise InputError(f"{where}: says nothing that could fail; expected one of {_words(_TESTS)}")
    for test in tests:
        kind = {bool: "flag", int: "number", float: "number", str: "text"}.get(type(one[test]), "")
        allowed = kinds if test == "equals" else kinds & {"number"}
        expected = " or ".join(words for each, words in _KINDS.items() if each in allowed)
        expected = expected or f"equals, since {path[-1]} is no number"
        _require(kind in allowed, where, test, one, expected)
    q_ids, needed = one.get("q_ids"), one.get("in_at_least", 1)
    if name in OF_ALL and {"q_ids", "in_at_least"} & one.keys():
        raise InputError(f"{where}: {name} is of all q_ids together; expected neither q_ids nor in_at_least")
    if q_ids is not None:
        are_names = isinstance(q_ids, list) and q_ids and all(isinstance(q_id, str) for q_id in q_ids)
        _require(bool(are_names), where, "q_ids", one, "a list of q_ids")
        require_q_ids(q_ids, relations, f"{where}: q_ids", csv_path)
        if both := [q_id for q_id in q_ids if q_id in exclusions]:
            raise InputError(f"{where}: {named(both)} is excluded by the same plan; expected one of the two")
    n = len({*(q_ids or [q_id for q_id in relations if q_id not in exclusions])})
    _require(type(needed) is int and 1 <= needed <= n, where, "in_at_least", one, f"a whole number from 1 to {n}")


def _require(holds: bool, where: str, name: str, content: Mapping[str, Any], expected: str) -> None:
    if not holds:
        found = repr(content[name])[:80] if name in content else "missing"
        raise InputError(f"{where}: {name} is {found}; expected {expected}")


def _require_keys(content: Any, known: Mapping[str, Any], where: str) -> None:
    if not isinstance(content, dict):
        raise InputError(f"{where}: is no JSON object; expected one of {_words(known)}")
    if unknown := [key for key in content if key not in known]:
        raise InputError(f"{where}: {named(unknown)} is not known here; expected some of {_words(known)}")


def _words(names: Iterable[str]) -> str:
    return ", ".join(names)


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)
