"""``relfv verify``: do the results in a folder still hold? Offline, from the files alone; nothing is written.

A q_id holds if every stage is done, every file is there with its recorded hash, was made from inputs that still have
theirs, is read by its own reader, and agrees with the others where that is cheap to see; and if no other file is there.
Which files those are, and what they must agree on, the stages declare. What lies beside the q_ids, the manifest and
cross_fv.json, holds a hash of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relfv.errors import InputError, RelfvError
from relfv.logs import printable
from relfv.report.table import natural_key
from relfv.runs.manifest import MANIFEST, read_manifest
from relfv.stages.cross import CROSS, CROSS_FIGURE, cross_changes, read_cross
from relfv.stages.stage import Finding
from relfv.stages.table import STAGES, file_named, steps
from relfv.store.files import REPLACED, sha256_file
from relfv.store.folder import QidFolder
from relfv.store.formats import json_bytes
from relfv.store.locks import holder_is_alive
from relfv.store.status import STATUS_FILE, QidStatus, fields_of, read_status_of_results


@dataclass(frozen=True)
class Problem:
    """One thing that does not hold."""

    kind: str
    """missing, damaged, unparsable, out of date, inconsistent, unexpected or unfinished."""
    file: str
    """Relative to the folder it is reported for."""
    detail: str = ""


@dataclass(frozen=True)
class Checked:
    """The state of one q_id's folder, or of a relation's manifest or cross_fv.json."""

    name: str
    """``<REL>/<Q>``, ``<REL>/run_manifest.json`` or ``<REL>/cross_fv.json``."""
    folder: str
    status: str
    """Of the q_id; empty for the others."""
    n_files: int
    problems: list[Problem]

    def line(self) -> str:
        """For a terminal; of many files of one kind the first five are named."""
        if not self.problems:
            said = "intact" if not self.status else f"{self.status} and intact ({self.n_files} files)"
            return printable(f"{self.name}  {said}")
        kinds: dict[str, list[str]] = {}
        for problem in self.problems:
            detail = f" ({problem.detail})" if problem.detail else ""
            kinds.setdefault(problem.kind, []).append(f"{problem.file}{detail}")
        more = {kind: f", and {len(files) - 5} more" if len(files) > 5 else "" for kind, files in kinds.items()}
        listed = "; ".join(f"{kind}: {', '.join(files[:5])}{more[kind]}" for kind, files in kinds.items())
        return printable(f"{self.name}  {listed}")


@dataclass(frozen=True)
class Verification:
    """Everything below one folder."""

    root: Path
    checked: list[Checked]

    @property
    def holds(self) -> bool:
        """True if nothing is wrong anywhere."""
        return not any(item.problems for item in self.checked)

    def to_json(self) -> str:
        """``{root, holds, checked [{name, folder, status, n_files, problems [{kind, file, detail}], holds}]}``."""
        checked = [{**asdict(item), "holds": not item.problems} for item in self.checked]
        return json_bytes({"root": str(self.root), "holds": self.holds, "checked": checked}).decode().rstrip()

    def to_text(self) -> str:
        """A line for each q_id and each file beside them, then the count."""
        broken = sum(bool(item.problems) for item in self.checked)
        counted = f"{broken} of {len(self.checked)} do not hold" if broken else f"all {len(self.checked)} hold"
        return "\n".join([*(item.line() for item in self.checked), "", counted])


def verify(root: Path) -> Verification:
    """Check a q_id's folder, a relation's, or all results below ``root``. Raises InputError if there are none."""
    if (root / "artifacts").is_dir():
        return Verification(root, [_check_qid(root)])
    relations = [root, *(path for path in _subfolders(root) if path.name != "artifacts")]
    checked = [item for relation in relations for item in _check_relation(relation)]
    if not checked:
        raise InputError(f"{root}: no results here; expected a folder that relfv run wrote to, or one within it")
    return Verification(root, checked)


def _subfolders(folder: Path) -> list[Path]:
    try:
        folders = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    except OSError as problem:
        raise InputError(f"{folder}: cannot be read as a folder ({problem.strerror})") from None
    return sorted((path for path in folders if REPLACED not in path.name), key=lambda path: natural_key(path.name))


def _check_relation(folder: Path) -> list[Checked]:
    """Its q_ids, those that the manifest knows and that are gone, cross_fv.json if there, and the manifest; nothing if
    it is no relation."""
    q_ids = [path for path in _subfolders(folder) if (path / "artifacts").is_dir()]
    manifest = folder / MANIFEST
    # The spec's single commands write no manifest, and no run.log either.
    if not manifest.exists() and not (q_ids and (folder / "run.log").exists()):
        return [*(_check_qid(path) for path in q_ids), *_check_cross(folder)]
    problems, known = [], []
    try:
        known = [q_id for run in _runs(folder) for q_id in run["q_list"]]
    except RelfvError as problem:
        kind = "damaged" if manifest.exists() else "missing"
        problems.append(Problem(kind, MANIFEST, _reason(problem, manifest)))
    gone = [folder / q_id for q_id in dict.fromkeys(known) if not (folder / q_id / "artifacts").is_dir()]
    checked = [_check_qid(path) for path in q_ids]
    checked += [Checked(_name(path), str(path), "", 0, [Problem("missing", "artifacts", "")]) for path in gone]
    checked += _check_cross(folder)
    return [*checked, Checked(f"{folder.resolve().name}/{MANIFEST}", str(folder), "", 1, problems)]


def _check_cross(folder: Path) -> list[Checked]:
    """What relfv cross left in a relation's folder: nothing if it never ran there."""
    path, figure = folder / CROSS, folder / CROSS_FIGURE
    if not path.exists() and not figure.exists():
        return []
    problems = []
    try:
        document = read_cross(folder)
        if sha256_file(figure) != document["figure"][CROSS_FIGURE]:
            problems.append(Problem("damaged" if figure.exists() else "missing", CROSS_FIGURE))
        changes = cross_changes(folder, document, fields_of(folder, document["q_ids"]))
        problems += [Problem("out of date", CROSS, change) for change in changes]
        if waiting := [q_id for q_id in document["q_ids"] if q_id not in document["targets"]]:
            goes_on = f"next: {waiting[0]}; the same 'relfv cross' goes on"
            problems.append(Problem("unfinished", CROSS, goes_on))
    except RelfvError as problem:
        problems.append(Problem("damaged" if path.exists() else "missing", CROSS, _reason(problem, path)))
    return [Checked(f"{folder.resolve().name}/{CROSS}", str(folder), "", 2, problems)]


def _runs(folder: Path) -> list[dict[str, Any]]:
    """The manifest's last run and the earlier ones. Raises RelfvError."""
    manifest = read_manifest(folder / MANIFEST)
    return [manifest, *manifest.get("earlier_runs", [])]


def _name(folder: Path) -> str:
    return "/".join(folder.resolve().parts[-2:])


def _reason(problem: RelfvError, path: Path) -> str:
    return str(problem).removeprefix(f"{path}: ")


def _check_qid(folder: Path) -> Checked:
    artifacts_dir = folder / "artifacts"
    status_file = artifacts_dir / STATUS_FILE
    try:
        status = read_status_of_results(artifacts_dir)
    except RelfvError as problem:
        kind = "damaged" if status_file.exists() else "missing"
        return Checked(_name(folder), str(folder), "", 0, [Problem(kind, STATUS_FILE, _reason(problem, status_file))])
    if status is None:
        return Checked(_name(folder), str(folder), "", 0, [Problem("missing", STATUS_FILE, "nothing was begun")])
    promised = {name: digest for record in status.stages.values() for name, digest in record.files.items()}
    problems = [*_unfinished(status), *_changed(status, promised), *_out_of_date(status, promised)]
    if status.status in ("completed", "skipped"):
        problems += _unexpected(artifacts_dir, {*promised, STATUS_FILE})
    if not problems:
        qid = QidFolder(artifacts_dir, status.q_id)
        problems = _unparsable(qid, promised)
        if not problems and status.status == "completed":
            problems = _inconsistent(qid, status)
    return Checked(_name(folder), str(folder), status.status, len(promised) + 1, problems)


def _unfinished(status: QidStatus) -> Iterator[Problem]:
    if status.status == "skipped":
        return
    done = {name for name, record in status.stages.items() if record.status == "completed"}
    missing = [step.name for step in steps(status.expected_layers) if step.name not in done]
    if status.status == "completed" and status.expected_layers and not missing:
        return
    running = status.status == "running" and holder_is_alive(QidFolder(status.artifacts_dir, status.q_id).lock)
    reason = "its process is at work" if running else status.reason or "the same 'relfv run' goes on"
    following = f"next stage: {missing[0]}; " if missing else ""
    yield Problem("unfinished", STATUS_FILE, f"{status.status}; {following}{reason}")


def _changed(status: QidStatus, promised: Mapping[str, str]) -> Iterator[Problem]:
    for name, expected in promised.items():
        path = status.artifacts_dir / name
        digest = sha256_file(path)
        if digest is None:
            yield Problem("damaged", name, "cannot be read") if path.exists() else Problem("missing", name)
        elif digest != expected:
            yield Problem("damaged", name)


def _out_of_date(status: QidStatus, promised: Mapping[str, str]) -> Iterator[Problem]:
    """Stages made from files that their own stage has written again since. Damaged inputs are reported as such,
    once."""
    for stage, record in status.stages.items():
        newer = [name for name, digest in record.inputs.items() if promised.get(name, digest) != digest]
        for name in record.files if newer else ():
            yield Problem("out of date", name, f"{stage} was made from another {newer[0]}")


def _unexpected(artifacts_dir: Path, expected: set[str]) -> Iterator[Problem]:
    for path in sorted(artifacts_dir.rglob("*")):
        name = path.relative_to(artifacts_dir).as_posix()
        if not path.is_dir() and not path.name.startswith(".") and name not in expected:
            yield Problem("unexpected", name)


def _unparsable(folder: QidFolder, promised: Mapping[str, str]) -> list[Problem]:
    problems = []
    for name in promised:
        path, file = folder.artifacts / name, file_named(name, folder.q_id)
        try:
            if file:
                folder.read_at(path, file)
        except RelfvError as problem:
            problems.append(Problem("unparsable", name, _reason(problem, path)))
    return problems


def _inconsistent(folder: QidFolder, status: QidStatus) -> list[Problem]:
    """Of files that are each as they were written: do they tell one story?"""
    checks: list[Callable[[QidFolder, QidStatus], Iterator[Finding]]] = [
        stage.agrees for stage in STAGES if stage.agrees and (not stage.on_request or stage.name in status.stages)
    ]
    try:
        findings = [finding for check in checks for finding in check(folder, status)]
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RelfvError) as problem:
        return [Problem("inconsistent", STATUS_FILE, f"the files' contents do not fit each other ({problem!r})")]
    findings.append(Finding(status.path, "its settings are those of a run in the manifest", _is_of_a_run(status)))
    return [
        Problem("inconsistent", finding.path.relative_to(folder.artifacts).as_posix(), f"expected: {finding.expected}")
        for finding in findings
        if not finding.holds
    ]


def _is_of_a_run(status: QidStatus) -> bool:
    """True if the manifest has a run of this q_id with its fingerprint, or knows none of this q_id at all."""
    runs: list[dict[str, Any]] = []
    with suppress(RelfvError):  # reported for the manifest itself, or the q_id was made by single commands
        runs = [run for run in _runs(status.artifacts_dir.parent.parent) if status.q_id in run["q_list"]]
    fields = status.fingerprint_fields
    described = [{**run["settings"], **{name: run[name] for name in run.keys() & fields.keys()}} for run in runs]
    return not runs or any(all(has.get(name, value) == value for name, value in fields.items()) for has in described)
