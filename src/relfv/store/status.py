"""``qid_status.json``: the state of a q_id, and the files that each finished stage has promised.

A stage is done when its files are there and match the sha256 recorded here; the record is written after them.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import orjson

from relfv import __version__
from relfv.errors import RelfvError, RunError
from relfv.fingerprints import fingerprint
from relfv.relations import is_q_id
from relfv.settings import Settings
from relfv.store.files import move_aside, read_bytes, remedy, require_hash, sha256_file, write_atomic
from relfv.store.formats import SEAL, is_as_sealed, sealed_bytes, unsealed

State = Literal["pending", "running", "completed", "failed", "skipped"]
HashOf = Callable[[Path], str | None]
STATUS_FILE = "qid_status.json"
_FORMAT = 2  # format 1, which did not state its number, had no hash of itself
_SHA256 = re.compile("[0-9a-f]{64}")


def now() -> str:
    """UTC time to the millisecond, ISO 8601."""
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


@dataclass
class StageRecord:
    """Record of one stage of one q_id."""

    status: str
    started_at: str
    finished_at: str | None = None
    files: dict[str, str] = field(default_factory=dict)
    """Files that the stage wrote: path relative to ``artifacts/`` -> sha256."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Files that the stage read: path relative to ``artifacts/`` -> sha256. A stage whose inputs have changed since is
    out of date, whoever changed them."""


@dataclass
class QidStatus:
    """The content of one qid_status.json, and where it lives."""

    artifacts_dir: Path
    q_id: str
    settings: Settings
    fingerprint_fields: dict[str, Any]
    status: State = "pending"
    reason: str | None = None
    created_at: str = field(default_factory=now)
    expected_layers: list[int] = field(default_factory=list)
    stages: dict[str, StageRecord] = field(default_factory=dict)
    q_row_count: int = 0
    other_files: dict[str, str] = field(default_factory=dict)
    """Files that a command was told to make here under names of their own: path relative to ``artifacts/`` ->
    sha256."""
    updated_at: str = ""
    is_sealed: bool = True
    """False for a status of an earlier version, which has no hash of itself."""
    trials_per_pass: dict[str, int] = field(default_factory=dict)
    """Number of prompts that shared a forward pass, by the kind of pass (stepD_cie, stepE_heads, stepE, step6, ...).
    Batch shapes change low-order bits, so a stage that is repeated, on whatever device, uses the number it was first
    made with."""
    name: str = ""
    """Name of the relation in words, as the CSV has it now. It is no part of the experiment."""
    reused_stepd: str | None = None
    """The ``artifacts`` folder that StepD's files were copied from."""

    @property
    def path(self) -> Path:
        """Path of the file, ``artifacts/qid_status.json``."""
        return self.artifacts_dir / STATUS_FILE

    def set(self, status: State, reason: str | None = None) -> None:
        """Change the state and write the file."""
        self.status, self.reason = status, reason
        self.write()

    def write(self) -> None:
        """Write the file atomically, with a hash of itself."""
        departures, self.updated_at = self.settings.departures(), now()
        content = {
            "status_format": _FORMAT,
            "q_id": self.q_id,
            "name": self.name,
            "status": self.status,
            "reason": self.reason,
            "created_at": self.created_at,
            "updated_at": self.updated_at,
            "q_row_count": self.q_row_count,
            "spec_conformant": not departures,
            "departures": departures,
            "config": self.settings.to_json(),
            "fingerprint": fingerprint(self.fingerprint_fields),
            "fingerprint_fields": self.fingerprint_fields,
            "expected_layers": self.expected_layers,
            "trials_per_pass": self.trials_per_pass,
            "stages": {name: vars(record) for name, record in self.stages.items()},
            "other_files": self.other_files,
            **({"reused_stepd": self.reused_stepd} if self.reused_stepd else {}),
        }
        write_atomic(self.path, sealed_bytes(content))

    def has_results(self) -> bool:
        """True if any stage has left files, which results of another experiment must not be mixed with."""
        return any(record.files for record in self.stages.values())

    def begin(self, stage: str, *, write: bool = True) -> None:
        """Record that ``stage`` runs. What it promised before stays known until the new files are there.

        ``write=False`` leaves the file for ``finish``: nothing but a reader who looks just then depends on this mark,
        since a record whose files are being replaced does not match them.
        """
        previous = self.stages.get(stage)
        self.stages[stage] = StageRecord("running", now(), files=previous.files if previous else {})
        if write:
            self.write()

    def finish(self, stage: str, files: dict[str, str], inputs: dict[str, str], *, write: bool = True) -> None:
        """Record that ``stage`` is done: what it wrote, and what it read, path relative to ``artifacts/`` -> sha256.
        Files it wrote before under other names go.

        ``write=False`` leaves the file for the next ``write``; what a kill then takes from the record is repeated.
        """
        previous = self.stages[stage]
        for name in previous.files.keys() - files.keys():
            (self.artifacts_dir / name).unlink(missing_ok=True)
        self.stages[stage] = StageRecord("completed", previous.started_at, now(), files, inputs)
        if write:
            self.write()

    def note(self, path: Path) -> None:
        """Record a file that a command was told to make under a name of its own, if it lies in this folder."""
        if path.resolve().is_relative_to(self.artifacts_dir.resolve()):
            self.other_files[str(path.resolve().relative_to(self.artifacts_dir.resolve()))] = require_hash(path)
            self.write()

    def intact(self, stage: str, hash_of: HashOf = sha256_file) -> bool:
        """True if ``stage`` is done, every file it promised is there, and neither those nor its inputs have changed."""
        record = self.stages.get(stage)
        if record is None or record.status != "completed" or not record.files:
            return False
        return not self._changed(record.files, hash_of) and not self._changed(record.inputs, hash_of)

    def make_way(self, stage: str) -> list[Path]:
        """Move folders that stand where ``stage`` has had files out of its way, beside ``artifacts/``. -> where they
        are."""
        record = self.stages.get(stage)
        paths = [self.artifacts_dir / name for name in record.files] if record else []
        return [
            move_aside(path, self.artifacts_dir.parent) for path in paths if path.is_dir() and not path.is_symlink()
        ]

    def damaged(self, stage: str) -> list[str]:
        """Files of ``stage`` that are missing or differ from their recorded hash."""
        return self._changed(self.stages[stage].files) if stage in self.stages else []

    def _changed(self, hashes: dict[str, str], hash_of: HashOf = sha256_file) -> list[str]:
        return [name for name, expected in hashes.items() if hash_of(self.artifacts_dir / name) != expected]


class DamagedStatus(RunError):
    """Error: the status that a folder's results are trusted by is missing or damaged."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(
            f"{path}: {what}, so nothing says whether the results beside it are whole and of these settings; put it "
            f"back, or let 'relfv run --q_list {shlex.quote(path.parent.parent.name)}' keep them in a folder aside and "
            "compute them afresh"
        )


class NewerStatus(RunError):
    """Error: the folder is whole, but a newer relfv wrote it."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path}: is whole, and was written by a newer relfv than this one, {__version__}; update it, or give "
            "--out_root another folder"
        )


def read_status(artifacts_dir: Path) -> QidStatus | None:
    """The status in ``artifacts_dir``, or None if there is none.

    Raises DamagedStatus if it is not one as ``write`` writes it, another RunError if the disk will not give it.
    """
    path = artifacts_dir / STATUS_FILE
    try:
        data = read_bytes(path)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except IsADirectoryError:
        raise DamagedStatus(path, "is damaged (a folder is in its place)") from None
    except OSError as problem:
        raise RunError(f"{path}: cannot be read ({problem.strerror}); {remedy(problem)}") from None
    try:
        values = orjson.loads(data)
        is_sealed = SEAL in values
        if not is_as_sealed(data):
            values = unsealed(values, path, older="status_format" not in values)
        if values.get("status_format", 0) > _FORMAT:
            raise NewerStatus(path)
        if not is_q_id(values["q_id"]):  # file names are made from the q_id
            raise ValueError(f"q_id {values['q_id']!r} is none")
        status = QidStatus(
            artifacts_dir=artifacts_dir,
            q_id=values["q_id"],
            settings=_settings(orjson.dumps(values["config"])),
            fingerprint_fields=values["fingerprint_fields"],
            status=values["status"],
            reason=values["reason"],
            created_at=values["created_at"],
            expected_layers=values["expected_layers"],
            stages={name: StageRecord(**record) for name, record in values["stages"].items()},
            q_row_count=values["q_row_count"],
            other_files=values.get("other_files", {}),
            updated_at=values["updated_at"],
            is_sealed=is_sealed,
            trials_per_pass=values.get("trials_per_pass", {}),
            reused_stepd=values.get("reused_stepd"),
            name=values.get("name", ""),
        )
        _require_sound(status, values["fingerprint"])
    except NewerStatus:
        raise
    except (RelfvError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        why = str(problem).removeprefix(f"{path}: ")
        raise DamagedStatus(path, f"is damaged or not a status file of relfv ({why})") from None
    return status


@lru_cache(maxsize=16)
def _settings(config: bytes) -> Settings:
    """Make and check settings, once for each text, since thousands of q_ids have the same. The text is compared, since
    1 and 1.0 are equal and differ."""
    return Settings.from_json(orjson.loads(config))


def read_status_of_results(artifacts_dir: Path) -> QidStatus | None:
    """``read_status``, but files without a status are a DamagedStatus: the status comes first and never goes."""
    status = read_status(artifacts_dir)
    # A hidden file is a temporary of a write under way, or not relfv's.
    if status is None and artifacts_dir.is_dir() and any(p.name[0] != "." for p in artifacts_dir.iterdir()):
        raise DamagedStatus(artifacts_dir / STATUS_FILE, "is missing")
    return status


def _require_sound(status: QidStatus, recorded_fingerprint: str) -> None:
    """Raise ValueError for what parses and still cannot have been written by ``write``: a flipped bit, a wrong edit."""
    fields, config = status.fingerprint_fields, status.settings.to_json()
    hashes = [status.other_files, *(side for r in status.stages.values() for side in (r.files, r.inputs))]
    names, digests = set[str]().union(*hashes), {digest for one in hashes for digest in one.values()}
    words = [
        status.created_at,
        status.updated_at,
        status.reason or "",
        status.name,
        status.reused_stepd or "",
        *(r.status for r in status.stages.values()),
    ]
    faults = {
        f"the status is {status.status!r}": status.status not in get_args(State),
        "the fingerprint is not that of its fields": recorded_fingerprint != fingerprint(fields),
        "a time, reason or stage's state is no text": not all(isinstance(word, str) for word in words),
        "the number of rows is none": not isinstance(status.q_row_count, int),
        "config and fingerprint differ": any(config.get(name, value) != value for name, value in fields.items()),
        "the layers are not 0 to L-1": status.expected_layers != list(range(len(status.expected_layers))),
        "a file's name leads out of the folder": any(map(_leads_out, names)),
        "a hash is not a sha256": not all(map(_SHA256.fullmatch, digests)),
        "trials_per_pass are not counts": any(count < 1 for count in status.trials_per_pass.values()),
    }
    wrong = [what for what, is_so in faults.items() if is_so]
    if wrong:
        raise ValueError("; ".join(wrong))


@lru_cache(maxsize=4096)
def _leads_out(name: str) -> bool:
    parts = set(name.split("/"))
    return name.startswith("/") or ".." in parts or parts <= {"", "."}
