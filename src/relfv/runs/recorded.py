"""Open a q_id's folder for a single command: read its status, take the command's settings into it where they agree with
what is there, and keep the command from writing over other results."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from relfv.errors import InputError, RunError
from relfv.fingerprints import differences
from relfv.logs import logging_to
from relfv.models.sources import model_identity
from relfv.models.stored import resolved
from relfv.runs.qid import require_frozen_trials, settling
from relfv.settings import IDENTITY, MODEL_SETTINGS, Settings
from relfv.stages.heatmap import HEATMAP
from relfv.stages.stage import Stage
from relfv.stages.table import file_named, free_settings
from relfv.store.folder import File, QidFolder
from relfv.store.status import QidStatus, read_status

log = logging.getLogger(__name__)

Overlay = Callable[[Settings], Settings]
"""Function that puts a command's flags over base settings."""


@contextmanager
def recorded(
    folder: QidFolder, overlay: Overlay, stages: Sequence[Stage], inputs: Sequence[File[Any]]
) -> Iterator[QidStatus]:
    """While open, hold the lock of a q_id's folder and give its status, with the command's settings taken into it; at
    the end the status says where the q_id stands.

    Raises InputError if settings or ``inputs`` are not the folder's own, RunError if the frozen trials were changed.
    """
    with folder.locked(), logging_to(folder.log):
        status = read_status(folder.artifacts)
        if status is None:
            raise RunError(f"{folder.artifacts}: its qid_status.json is gone; was the folder moved meanwhile?")
        settings = settings_within(status, overlay, stages)
        require_frozen_trials(status)
        for file in inputs:
            _require_own(status, folder, file)
        free = free_settings(status, stages)
        status.fingerprint_fields |= {name: getattr(settings, name) for name in free}
        # Model path and device are this command's choice; the files keep the names they began with.
        kept = {name: getattr(status.settings, name) for name in ("model", "device", "relation_csv_path")}
        status.settings = replace(settings, **kept)
        with settled_aloud(status):
            status.set("running")
            yield status


@contextmanager
def noted(folder: QidFolder, out: Path) -> Iterator[None]:
    """While open, hold the lock of a q_id's folder; at the end record ``out``, a file made under a name of its own, in
    its status."""
    with folder.locked():
        yield
        if status := read_status(folder.artifacts):
            status.note(out)


@contextmanager
def settled_aloud(status: QidStatus) -> Iterator[None]:
    with settling(status):
        yield
    if status.status == "completed":
        log.info("%s completed", status.q_id)


def settings_within(status: QidStatus, overlay: Overlay, stages: Sequence[Stage]) -> Settings:
    """Settings of the folder with the command's flags over them. A flag may differ from what the folder says only if no
    step that depends on it has been begun, besides those of ``stages``, which are about to run; the model, if they need
    one, must be the folder's. Raises InputError."""
    settings, model = overlay(status.settings), {}
    if any(set(MODEL_SETTINGS) <= set(stage.settings) for stage in stages):
        settings = resolved(settings)
        model = {"model_identity": model_identity(settings.model, settings.revision)}
    free = free_settings(status, stages)
    wanted = {name: getattr(settings, name) for name in IDENTITY if name not in free}
    require_same(status, {**wanted, **model}, settings.model)
    return settings


def require_same(status: QidStatus, wanted: Mapping[str, Any], model: str) -> None:
    """Raise InputError if any of these fingerprint fields is another than the folder's; ``model`` is the command's."""
    there = {name: status.fingerprint_fields[name] for name in wanted if name in status.fingerprint_fields}
    if differing := differences(there, wanted, status.q_id, models=(status.settings.model, model)):
        raise InputError(
            f"{status.artifacts_dir} holds results of another experiment: {', '.join(differing)}; use another output "
            "folder, or move this one aside"
        )


def _require_own(status: QidStatus, folder: QidFolder, file: File[Any]) -> None:
    """Raise InputError for an input that is not the q_id's own file, or not as its stage wrote it."""
    given, name = folder.path(file), file.named(status.q_id)
    if given.resolve() != (status.artifacts_dir / name).resolve():
        raise InputError(
            f"{given} is not {name} of {status.artifacts_dir}, whose results would then rest on something else; "
            "write to another folder to combine them"
        )
    for maker in [stage for stage, record in status.stages.items() if name in record.files]:
        if name in status.damaged(maker):
            raise InputError(f"{given} has been changed since {maker} wrote it; run that stage again, or put it back")


def require_free(flag: str, out: Path, file: File[Any], status: QidStatus | None) -> None:
    """Raise InputError for an output that would take the place of another file of the contract, or of any that relfv
    did not make by this command: only a file of the same kind is replaced."""
    other = file_named(out.name, status.q_id) if status else None
    if other not in (None, file) or (status and out.resolve() == status.path.resolve()):
        raise InputError(f"{flag} {out.name}: is the name of another result of this q_id; choose another name")
    if not out.exists():
        return
    if not out.is_file() or (file is HEATMAP and not out.read_bytes().startswith(b"\x89PNG")):
        raise InputError(
            f"{flag} {out.name}: {out} is there and is no picture; it is not replaced, so choose another name"
        )
    if file is not HEATMAP:
        file.read(out)
