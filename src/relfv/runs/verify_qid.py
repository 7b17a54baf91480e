"""Check one q_id's folder for ``relfv verify``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relfv.errors import RelfvError, in_words
from relfv.logs import printable
from relfv.report.sections import shown
from relfv.runs.manifest import MANIFEST, manifest_runs
from relfv.stages.stage import Check
from relfv.stages.table import STAGES, file_named, steps
from relfv.store.files import sha256_file
from relfv.store.folder import QidFolder
from relfv.store.locks import held_by
from relfv.store.status import STATUS_FILE, DamagedStatus, QidStatus, read_status_of_results


@dataclass(frozen=True)
class Problem:
    """One thing in a folder that does not hold."""

    kind: str
    """Kind of problem: missing, damaged, unparsable, out of date, inconsistent, unexpected or unfinished."""
    file: str
    """Path of the file, relative to the folder that the problem is reported for."""
    detail: str = ""


@dataclass(frozen=True)
class Checked:
    """The state of one q_id's folder, or of a relation's manifest, page or cross_fv.json."""

    name: str
    """Name to show: ``<REL>/<Q>``, ``<REL>/run_manifest.json``, ``<REL>/report/index.html`` or
    ``<REL>/cross_fv.json``."""
    folder: str
    status: str
    """Status of the q_id; empty for other files."""
    n_files: int
    problems: list[Problem]
    note: str = ""
    """Further words about the result."""
    at_work: bool = False
    """True if a process is writing the q_id just now, or will: its files were then not checked."""

    def line(self) -> str:
        """The result as a line for a terminal; of many files of one kind the first five are named."""
        note = f"; {self.note}" if self.note else ""
        if self.at_work:
            return printable(f"{self.name}  not checked: {self.note}")
        if not self.problems:
            said = "intact" if not self.status else f"{self.status} and intact ({self.n_files} files{note})"
            return printable(f"{self.name}  {said}")
        kinds: dict[str, list[str]] = {}
        for problem in self.problems:
            detail = f" ({problem.detail})" if problem.detail else ""
            kinds.setdefault(problem.kind, []).append(f"{problem.file}{detail}")
        more = {kind: f", and {len(files) - 5} more" if len(files) > 5 else "" for kind, files in kinds.items()}
        listed = "; ".join(f"{kind}: {', '.join(files[:5])}{more[kind]}" for kind, files in kinds.items())
        return printable(f"{self.name}  {listed}{note}")


def name_of(folder: Path) -> str:
    """Name of a q_id's folder, ``<REL>/<Q>``."""
    return "/".join(folder.resolve().parts[-2:])


def reason_of(problem: Exception, path: Path) -> str:
    """The error's words, without the path that stands in front of them."""
    return in_words(problem).removeprefix(f"{path}: ")


def writer_of(folder: Path) -> str | None:
    """The process that writes in a q_id's folder just now, or None."""
    return held_by(QidFolder(folder / "artifacts", folder.name).lock)


def check_qid(folder: Path, *, awaited: bool = False) -> Checked:
    """Check one q_id; ``awaited`` if a run is at work that may come to it yet."""
    checked = None
    if not (holder := writer_of(folder)):
        try:
            checked = _checked(folder, awaited)
        except Exception as problem:  # whatever is wrong in this folder, the others are checked
            path = folder / "artifacts" / STATUS_FILE
            checked = Checked(name_of(folder), str(folder), "", 0, [Problem("damaged", ".", reason_of(problem, path))])
        if not checked.problems or not (holder := writer_of(folder)):
            return checked
    # Files that are being written do not fit the others yet.
    return Checked(name_of(folder), str(folder), "running", 0, [], f"is being written by {holder}", at_work=True)


def _checked(folder: Path, awaited: bool) -> Checked:
    name, artifacts_dir = name_of(folder), folder / "artifacts"
    status_file = artifacts_dir / STATUS_FILE
    try:
        status = read_status_of_results(artifacts_dir)
    except RelfvError as problem:  # if not damaged: by a newer relfv, or a disk error
        found = "damaged" if isinstance(problem, DamagedStatus) else "unparsable"
        kind = found if status_file.exists() else "missing"
        return Checked(name, str(folder), "", 0, [Problem(kind, STATUS_FILE, reason_of(problem, status_file))])
    if status is None:
        return Checked(name, str(folder), "", 0, [Problem("missing", STATUS_FILE, "nothing was begun")])
    if awaited and status.status == "pending" and not status.has_results():
        return Checked(name, str(folder), "pending", 0, [], "waits for the run that is at work", at_work=True)
    promised = {name: digest for record in status.stages.values() for name, digest in record.files.items()}
    # No other file depends on these, so users may delete them.
    promised |= {name: digest for name, digest in status.other_files.items() if (artifacts_dir / name).exists()}
    problems = [*_of_another(folder, status), *_unfinished(status, awaited)]
    problems += [*_changed(status, promised), *_out_of_date(status, promised)]
    if status.status in ("completed", "skipped"):
        problems += _unexpected(artifacts_dir, {*promised, STATUS_FILE})
    if not problems:
        qid = QidFolder(artifacts_dir, status.q_id)
        problems = _unparsable(qid, promised)
        if not problems and status.status == "completed":
            problems = _inconsistent(qid, status)
    note = "" if status.is_sealed else "its status is of an earlier version, and edits of it cannot be told"
    return Checked(name, str(folder), status.status, len(promised) + 1, problems, note)


def _of_another(folder: Path, status: QidStatus) -> Iterator[Problem]:
    """Yield a problem for a folder that was exchanged, or replaced by a copy of another. A folder that stands alone may
    have any name."""
    here = folder.resolve()
    among_others = (here.parent / MANIFEST).exists() or (here.parent / status.q_id / "artifacts").is_dir()
    if status.q_id != here.name and among_others:
        yield Problem("inconsistent", STATUS_FILE, f"expected: results of {here.name}, and these are of {status.q_id}")


def _unfinished(status: QidStatus, awaited: bool) -> Iterator[Problem]:
    if status.status == "skipped" or (awaited and status.status == "pending"):
        return
    done = {name for name, record in status.stages.items() if record.status == "completed"}
    wanted = steps(status.expected_layers, extras=status.settings.has_extras)
    missing = [step.name for step in wanted if step.name not in done]
    if status.status == "completed" and status.expected_layers and not missing:
        return
    following = f"next stage: {missing[0]}; " if missing else ""
    reason = status.reason or "the same 'relfv run' goes on"
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
    """Yield stages made from files that their own stage has written again since. Damaged inputs are reported as such,
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
        except Exception as problem:  # the reader met a shape that it does not know
            problems.append(Problem("unparsable", name, reason_of(problem, path)))
    return problems


def _inconsistent(folder: QidFolder, status: QidStatus) -> list[Problem]:
    """List contradictions between files that are each as they were written."""
    left_out = {stage for stage in STAGES if (stage.asked or stage.extra) and stage.name not in status.stages}
    checks: list[Callable[[QidFolder, QidStatus], Iterator[Check]]] = [
        stage.agrees for stage in STAGES if stage.agrees and stage not in left_out
    ]
    try:
        findings = [finding for check in checks for finding in check(folder, status)]
        shown(status.artifacts_dir.parent.parent, status, folder)
    except Exception as problem:
        return [Problem("inconsistent", STATUS_FILE, f"the files' contents do not fit each other ({problem!r})")]
    findings.append(Check(status.path, "its settings are those of a run in the manifest", _is_of_a_run(status)))
    return [
        Problem("inconsistent", finding.path.relative_to(folder.artifacts).as_posix(), f"expected: {finding.expected}")
        for finding in findings
        if not finding.holds
    ]


def _is_of_a_run(status: QidStatus) -> bool:
    """True if the manifest has a run of this q_id with its fingerprint, or knows none of this q_id at all."""
    runs: list[dict[str, Any]] = []
    with suppress(RelfvError):  # a bad manifest is reported itself; single commands write none
        runs = [
            run for run in manifest_runs(status.artifacts_dir.parent.parent / MANIFEST) if status.q_id in run["q_list"]
        ]
    fields = status.fingerprint_fields
    described = [{**run["settings"], **{name: run[name] for name in run.keys() & fields.keys()}} for run in runs]
    return not runs or any(all(has.get(name, value) == value for name, value in fields.items()) for has in described)
