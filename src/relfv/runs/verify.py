"""``relfv verify``: check that the results in a folder still hold. Offline, from the files alone; nothing is written.

A q_id (verify_qid.py) holds if every stage is done, every file is there with its recorded hash, was made from inputs
that still have theirs, is read by its own reader, and agrees with the others where that is cheap to see; and if no
other file is there, and the folder is its own. Which files those are, and what they must agree on, the stages declare.
qid_status.json itself and what lies beside the q_ids, the manifest, plan.json, the page, cross_fv.json, aggregate.json
and the tables' record, hold a hash of themselves. Logs are not checked. What a process is writing just now is left for
later, and no problem.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from relfv.errors import InputError, RelfvError
from relfv.progress import at_work, counted
from relfv.report.page import page_path, page_problem
from relfv.report.registered import PLAN, registered_in
from relfv.report.written_tables import tables_problem
from relfv.runs.manifest import MANIFEST, manifest_runs
from relfv.runs.verify_qid import Checked, Problem, check_qid, name_of, reason_of, writer_of
from relfv.stages.aggregate import AGGREGATE, aggregate_problems, read_aggregate
from relfv.stages.cross import CROSS, CROSS_FIGURE, cross_changes, read_cross
from relfv.store.files import sha256_file
from relfv.store.folder import is_of_a_qid, was_moved_aside
from relfv.store.formats import json_bytes
from relfv.store.statuses import fields_of, natural_key


@dataclass(frozen=True)
class Verification:
    """Result of checking everything below one folder."""

    root: Path
    checked: list[Checked]

    @property
    def holds(self) -> bool:
        """True if nothing is wrong anywhere."""
        return not any(item.problems for item in self.checked)

    def to_json(self) -> str:
        """The result as JSON: ``{root, holds, checked [{name, folder, status, n_files, problems [{kind, file, detail}],
        note, at_work, holds}]}``."""
        checked = [{**asdict(item), "holds": not item.problems} for item in self.checked]
        return json_bytes({"root": str(self.root), "holds": self.holds, "checked": checked}).decode().rstrip()

    def to_text(self) -> str:
        """The result as text: a line for each q_id and each file beside them, then the count."""
        broken = sum(bool(item.problems) for item in self.checked)
        at_work = sum(item.at_work for item in self.checked)
        n = len(self.checked) - at_work
        counted = f"{broken} of {n} do not hold" if broken else f"all {n} hold"
        left = f"; {at_work} not checked, since a process is at work: ask again when it has ended" if at_work else ""
        return "\n".join([*(item.line() for item in self.checked), "", counted + left])


def verify(root: Path) -> Verification:
    """Check a q_id's folder, a relation's, or all results below ``root``. Raises InputError if there are none."""
    if is_of_a_qid(root):
        return Verification(root, [check_qid(root)])
    below = _subfolders(root)
    relations = [root] if any(map(is_of_a_qid, below)) or (root / MANIFEST).exists() else below
    checked = [item for relation in relations for item in _check_relation(relation)]
    if not checked:
        raise InputError(f"{root}: no results here; expected a folder that relfv run wrote to, or one within it")
    if root not in relations:
        checked += [*_check_aggregate(root), *_check_page(root)]  # the aggregate of several relations, and the index
    return Verification(root, checked)


def _subfolders(folder: Path) -> list[Path]:
    try:
        folders = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    except OSError as problem:
        raise InputError(f"{folder}: cannot be read as a folder ({problem.strerror})") from None
    return sorted(folders, key=lambda path: natural_key(path.name))


def _check_relation(folder: Path) -> list[Checked]:
    """Check a relation: its q_ids, those that the manifest knows and that are gone, the files beside them, and the
    manifest. Nothing if it is no relation."""
    q_ids = [path for path in _subfolders(folder) if is_of_a_qid(path) and not was_moved_aside(path.name)]
    manifest = folder / MANIFEST
    awaited = any(map(writer_of, q_ids))
    with at_work("verify", f"hashing and reading the files of {folder.name}", unit="q_ids"):
        checked = [check_qid(path, awaited=awaited) for path in counted(q_ids)]
    # The spec's single commands write no manifest, and no run.log either.
    if not manifest.exists() and not (q_ids and (folder / "run.log").exists()):
        return [*checked, *_check_beside(folder)]
    problems, known = [], []
    try:
        known = [q_id for run in manifest_runs(folder / MANIFEST) for q_id in run["q_list"]]
    except RelfvError as problem:
        kind = "damaged" if manifest.exists() else "missing"
        problems.append(Problem(kind, MANIFEST, reason_of(problem, manifest)))
    # A run that is at work may just have moved some q_ids aside.
    gone = [] if awaited else [folder / q_id for q_id in dict.fromkeys(known) if not is_of_a_qid(folder / q_id)]
    checked += [Checked(name_of(path), str(path), "", 0, [Problem("missing", "artifacts", "")]) for path in gone]
    checked += _check_beside(folder)
    return [*checked, Checked(f"{folder.resolve().name}/{MANIFEST}", str(folder), "", 1, problems)]


def _check_beside(folder: Path) -> list[Checked]:
    """Check the files that other commands left in a relation's folder."""
    checks = (_check_plan, _check_cross, _check_aggregate, _check_page, _check_tables)
    return [item for check in checks for item in check(folder)]


def _check_plan(folder: Path) -> list[Checked]:
    """Check the plan that ``relfv run --plan`` registered; nothing if it registered none."""
    path, problems = folder / PLAN, []
    if not path.exists():
        return []
    try:
        registered_in(folder)
    except RelfvError as problem:
        problems.append(Problem("damaged", PLAN, reason_of(problem, path)))
    return [Checked(f"{folder.resolve().name}/{PLAN}", str(folder), "", 1, problems)]


def _check_aggregate(folder: Path) -> list[Checked]:
    """Check the files that ``relfv aggregate`` left; nothing if it never ran there. Relations that wait to be left out
    are no problem: it may have been told to open no model."""
    path = folder / AGGREGATE
    if not path.exists():
        return []
    problems = []
    try:
        document = read_aggregate(folder)
        damaged, changed = aggregate_problems(folder, document)
        problems += [Problem("damaged" if (folder / name).exists() else "missing", name) for name in damaged]
        problems += [Problem("out of date", AGGREGATE, change) for change in changed]
    except RelfvError as problem:
        problems.append(Problem("damaged", AGGREGATE, reason_of(problem, path)))
    return [Checked(f"{folder.resolve().name}/{AGGREGATE}", str(folder), "", 4, problems)]


def _check_page(folder: Path) -> list[Checked]:
    """Check the page or index, if there is one: it can be made again at any time."""
    return _beside(folder, page_path(folder).relative_to(folder).as_posix(), page_problem(folder))


def _check_tables(folder: Path) -> list[Checked]:
    """Check a relation's tables, if there are any: they can be made again, too."""
    name, problem = tables_problem(folder) or ("", None)
    return _beside(folder, name, problem)


def _beside(folder: Path, name: str, problem: str | None) -> list[Checked]:
    if not problem:
        return []
    return [Checked(f"{folder.resolve().name}/{name}", str(folder), "", 1, [Problem("damaged", name, problem)])]


def _check_cross(folder: Path) -> list[Checked]:
    """Check the files that ``relfv cross`` left in a relation's folder; nothing if it never ran there."""
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
        problems.append(Problem("damaged" if path.exists() else "missing", CROSS, reason_of(problem, path)))
    return [Checked(f"{folder.resolve().name}/{CROSS}", str(folder), "", 2, problems)]
