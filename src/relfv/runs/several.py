"""Choose the finished q_ids for a command that needs several of them, and find the settings they share."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from relfv.errors import InputError
from relfv.fingerprints import differences, fingerprint_fields
from relfv.models.sources import model_identity
from relfv.models.stored import resolved
from relfv.settings import Settings
from relfv.stages.cross import CROSS_SETTINGS
from relfv.stages.table import is_complete
from relfv.store.status import DamagedStatus, QidStatus, read_status
from relfv.store.statuses import find_statuses

log = logging.getLogger(__name__)


def completed_q_ids(folder: Path, q_list: Sequence[str] | None, *, below: bool = False) -> dict[str, QidStatus]:
    """The completed q_ids of a relation's ``folder``, or those of ``q_list``, by name in their folders' order;
    ``below`` finds those of the relations in ``folder``, too, and calls them ``<REL>/<Q>``.

    Raises InputError for fewer than two, and for damaged ones.
    """
    depth = (1, 2) if below else (1,)
    paths = [(path.parent.relative_to(folder), path) for path in find_statuses(folder)]
    there = {name.as_posix(): path for name, path in paths if len(name.parts) in depth}
    if not there:
        raise InputError(
            f"{folder}: no q_id here; expected a relation's results folder, e.g. results_fv/relation_qwise/relationA_ex"
        )
    if unknown := [q_id for q_id in q_list or () if q_id not in there]:
        raise InputError(f"--q_list: {', '.join(unknown)} not in {folder}, which has {', '.join(there)}")
    statuses, left_out = {}, {}
    for q_id, path in there.items():
        if q_list is not None and q_id not in q_list:
            continue
        try:
            status = read_status(path)
        except DamagedStatus as problem:
            raise InputError(str(problem)) from None
        if status is None or status.q_id != path.parent.name:
            raise InputError(f"{path}: its qid_status.json is of another q_id; was the folder renamed?")
        if status.status != "completed":
            left_out[q_id] = status.status
        elif not is_complete(status):
            raise InputError(
                f"{path}: completed, but not as its status says ('relfv verify {shlex.quote(str(path.parent))}' names "
                "what); the same 'relfv run' mends it, or leave the q_id out by --q_list"
            )
        else:
            statuses[q_id] = status
    said = ", ".join(f"{q_id} ({state})" for q_id, state in left_out.items())
    if q_list is not None and left_out:
        raise InputError(f"--q_list: {said} in {folder}; expected completed q_ids, so run them first")
    if len(statuses) < 2:
        raise InputError(
            f"{folder}: {len(statuses)} completed q_id(s){f' besides {said}' if said else ''}; expected at least "
            "two, whose vectors can then be compared: run more with 'relfv run'"
        )
    if said:
        log.info("left out: %s", said)
    return statuses


def shared_settings(
    folder: Path, statuses: Mapping[str, QidStatus], overlay: Callable[[Settings], Settings]
) -> Settings:
    """The settings to open the model with. Raises InputError, naming what differs, if any q_id was made with others."""
    settings = resolved(overlay(next(iter(statuses.values())).settings))
    identity = model_identity(settings.model, settings.revision)
    here = fingerprint_fields(settings, rows_sha256="", model_identity=identity)
    wanted = {name: here[name] for name in CROSS_SETTINGS}
    differing: dict[str, list[str]] = {}
    for q_id, status in statuses.items():
        there = {name: status.fingerprint_fields.get(name) for name in wanted}
        models = status.settings.model, settings.model
        if different := differences(there, wanted, q_id, models=models):
            differing.setdefault(", ".join(different), []).append(q_id)
    if differing:
        said = "; ".join(f"{', '.join(q_ids)} ({what})" for what, q_ids in differing.items())
        raise InputError(
            f"{folder}: made with another model or other arithmetic: {said}; expected what the q_ids were made with, "
            "so leave out the flags that differ (or unset DTYPE and QUANT), or narrow --q_list to q_ids that share "
            "them"
        )
    return settings


def require_alike(folder: Path, statuses: Mapping[str, QidStatus]) -> None:
    """Raise InputError, naming what differs, for q_ids made with other settings than the first: their numbers are not
    of one kind. Rows differ, and seeds may."""
    may_differ = {"rows_sha256", "seed"}

    def kind(status: QidStatus) -> dict[str, Any]:
        return {name: value for name, value in status.fingerprint_fields.items() if name not in may_differ}

    first, *rest = statuses
    model = statuses[first].settings.model
    for name in rest:
        models = (model, statuses[name].settings.model)
        if different := differences(kind(statuses[first]), kind(statuses[name]), name, models=models):
            raise InputError(
                f"{folder}: {name} was made with other settings than {first} ({', '.join(different)}); expected the "
                "same but for rows and seed, so narrow --q_list to q_ids that share them"
            )
