"""``relfv verify``: do the results in a folder still hold? Offline, from the files alone; nothing is written.

A q_id holds if every stage is done, every file is there with its recorded hash, was made from inputs that still have
theirs, is read by its own reader, and agrees with the others where that is cheap to see; and if no other file is there.
What lies beside the q_ids, the manifest and cross_fv.json, holds a hash of itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relfv.errors import InputError, RelfvError
from relfv.report.table import natural_key
from relfv.runs.manifest import read_manifest
from relfv.store import artifacts
from relfv.store.artifacts import CROSS, CROSS_FIGURE, MANIFEST, QidPaths
from relfv.store.files import REPLACED, holder_is_alive, json_bytes, read_json, sha256_file
from relfv.store.status import STATUS_FILE, SWEEPS, QidStatus, fields_of, read_status_of_results


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
    """What was found in one q_id's folder, or for a relation's manifest or cross_fv.json."""

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
            return f"{self.name}  {said}"
        kinds: dict[str, list[str]] = {}
        for problem in self.problems:
            detail = f" ({problem.detail})" if problem.detail else ""
            kinds.setdefault(problem.kind, []).append(f"{problem.file}{detail}")
        more = {kind: f", and {len(files) - 5} more" if len(files) > 5 else "" for kind, files in kinds.items()}
        return f"{self.name}  " + "; ".join(
            f"{kind}: {', '.join(files[:5])}{more[kind]}" for kind, files in kinds.items()
        )


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
        found = [path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."]
    except OSError as problem:
        raise InputError(f"{folder}: cannot be read as a folder ({problem.strerror})") from None
    return sorted((path for path in found if REPLACED not in path.name), key=lambda path: natural_key(path.name))


def _check_relation(folder: Path) -> list[Checked]:
    """Its q_ids, those that the manifest knows and that are gone, cross_fv.json if there, and the manifest; nothing if it
    is no relation."""
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
        document = artifacts.read_cross(folder)
        found, expected = sha256_file(figure), document["figure"][CROSS_FIGURE]
        if found != expected:
            problems.append(Problem("damaged" if figure.exists() else "missing", CROSS_FIGURE))
        changes = artifacts.cross_changes(folder, document, fields_of(folder, document["q_ids"]))
        problems += [Problem("out of date", CROSS, change) for change in changes]
        if waiting := [q_id for q_id in document["q_ids"] if q_id not in document["targets"]]:
            goes_on = f"next: {waiting[0]}; the same 'relfv cross' goes on"
            problems.append(Problem("unfinished", CROSS, goes_on))
    except RelfvError as problem:
        problems.append(Problem("damaged" if path.exists() else "missing", CROSS, _reason(problem, path)))
    return [Checked(f"{folder.resolve().name}/{CROSS}", str(folder), "", 2, problems)]


def _runs(folder: Path) -> list[dict[str, Any]]:
    """The manifest's last run and the earlier ones. Raises RunError."""
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
        problems = _unparsable(artifacts_dir, promised)
    if not problems and status.status == "completed":
        problems = _inconsistent(status)
    return Checked(_name(folder), str(folder), status.status, len(promised) + 1, problems)


def _unfinished(status: QidStatus) -> Iterator[Problem]:
    if status.status == "skipped":
        return
    records, names = status.stages, status.stage_names
    if SWEEPS in records and records[SWEEPS].status != "completed":
        yield Problem("unfinished", "step6/sweeps.json", "the same 'relfv run' makes it again")
    missing = [name for name in names if name not in records or records[name].status != "completed"]
    if status.status == "completed" and status.expected_layers and not missing:
        return
    running = status.status == "running" and holder_is_alive(QidPaths(status.artifacts_dir, status.q_id).lock)
    reason = "its process is at work" if running else status.reason or "the same 'relfv run' goes on"
    following = f"next stage: {missing[0]}; " if missing else ""
    yield Problem("unfinished", STATUS_FILE, f"{status.status}; {following}{reason}")


def _changed(status: QidStatus, promised: dict[str, str]) -> Iterator[Problem]:
    for name, expected in promised.items():
        path = status.artifacts_dir / name
        found = sha256_file(path)
        if found is None:
            yield Problem("damaged", name, "cannot be read") if path.exists() else Problem("missing", name)
        elif found != expected:
            yield Problem("damaged", name)


def _out_of_date(status: QidStatus, promised: dict[str, str]) -> Iterator[Problem]:
    """Stages made from files that their own stage has written anew since. Damaged inputs are reported as such, once."""
    for stage, record in status.stages.items():
        newer = [name for name, digest in record.inputs.items() if promised.get(name, digest) != digest]
        for name in record.files if newer else ():
            yield Problem("out of date", name, f"{stage} was made from another {newer[0]}")


def _unexpected(artifacts_dir: Path, expected: set[str]) -> Iterator[Problem]:
    for path in sorted(artifacts_dir.rglob("*")):
        name = path.relative_to(artifacts_dir).as_posix()
        if not path.is_dir() and not path.name.startswith(".") and name not in expected:
            yield Problem("unexpected", name)


_READERS: dict[str, Callable[[Path], Any]] = {
    "sampled_trials.json": artifacts.read_trials,
    "sampled_trials_zeroshot.json": artifacts.read_trials,
    "cie_scores.csv": artifacts.read_scores,
    "aie_scores.csv": artifacts.read_scores,
    "noise_floor.json": artifacts.read_noise_floor,
    "global_clean_mean.pt": artifacts.read_means,
    "fv_global_resid.pt": artifacts.read_function_vector,
    "fv_by_layer.pt": artifacts.read_fv_by_layer,
    ".pt": artifacts.read_means,
    ".json": read_json,
    ".jsonl": artifacts.read_rows,
}
"""By name, else by ending. Pictures have none: their hash says enough."""


def _unparsable(artifacts_dir: Path, promised: dict[str, str]) -> list[Problem]:
    problems = []
    for name in promised:
        path = artifacts_dir / name
        try:
            _READERS.get(path.name, _READERS.get(path.suffix, Path.stat))(path)
        except RelfvError as problem:
            problems.append(Problem("unparsable", name, _reason(problem, path)))
    return problems


def _inconsistent(status: QidStatus) -> list[Problem]:
    """Of files that are each as they were written: do they tell one story?"""
    paths = QidPaths(status.artifacts_dir, status.q_id)
    try:
        stories = [*_step_d_story(status, paths), *_vector_story(status, paths), *_step6_story(status, paths)]
        stories += _sweeps_story(status, paths)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RelfvError) as problem:
        return [Problem("inconsistent", STATUS_FILE, f"the files' contents do not fit each other ({problem!r})")]
    stories.append(
        (paths.artifacts / STATUS_FILE, "its settings are those of a run in the manifest", _is_of_a_run(status))
    )
    return [
        Problem("inconsistent", path.relative_to(paths.artifacts).as_posix(), f"expected: {expected}")
        for path, expected, holds in stories
        if not holds
    ]


Story = Iterator[tuple[Path, str, bool]]
"""The file to name, what is expected of it, whether it is so."""


def _step_d_story(status: QidStatus, paths: QidPaths) -> Story:
    trials, zero_shot = artifacts.read_trials(paths.trials).trials, artifacts.read_trials(paths.zero_shot_trials).trials
    cie, aie = artifacts.read_scores(paths.cie), artifacts.read_scores(paths.aie)
    heads = [head.id for head in cie]
    swept = [(row["trial_idx"], row["layer"], row["head"]) for row in artifacts.read_rows(paths.metrics)]
    means = artifacts.read_means(paths.means).values
    n = status.settings.n_trials_per_q
    yield paths.trials, f"{n} trials of {status.q_id}", [t["q_id"] for t in trials] == [status.q_id] * n
    same = [[(t["trial_id"], t["query"], t["target_first_token_id"]) for t in made] for made in (trials, zero_shot)]
    yield paths.zero_shot_trials, "the same queries as sampled_trials.json", same[0] == same[1]
    every = [(i, head.layer, head.head) for i in range(len(trials)) for head in heads]
    yield paths.metrics, "one row a trial and head of cie_scores.csv", sorted(swept) == sorted(every)
    yield paths.cie, "n_trials as in sampled_trials.json", all(head.n_trials == len(trials) for head in cie)
    scores = [{head.id: head.scores for head in table} for table in (cie, aie)]
    yield paths.aie, "the heads and scores of cie_scores.csv", scores[0] == scores[1] and len(cie) == len(aie)
    yield paths.means, "as many layers as qid_status.json", len(means) == len(status.expected_layers)
    per_pass = read_json(paths.noise_floor)["trials_per_pass"]
    yield (
        paths.noise_floor,
        "trials_per_pass as in qid_status.json",
        status.trials_per_pass.get("stepD_cie") == per_pass,
    )


def _vector_story(status: QidStatus, paths: QidPaths) -> Story:
    score_key, topk = status.settings.score_key, status.settings.topk
    rank = {(head.id.layer, head.id.head): head.scores[score_key] for head in artifacts.read_scores(paths.cie)}
    top = {(head["layer"], head["head"]): head["rank_score"] for head in read_json(paths.top_heads)["heads"]}
    yield (
        paths.top_heads,
        f"{topk} heads with their {score_key} of cie_scores.csv",
        (len(top) == topk and top.items() <= rank.items()),
    )
    yield (
        paths.fv_meta,
        "the heads of top_heads.json",
        [tuple(head) for head in read_json(paths.fv_meta)["heads"]] == [*top],
    )
    fv, parts = artifacts.read_function_vector(paths.fv), artifacts.read_fv_by_layer(paths.fv_by_layer)
    yield paths.fv_by_layer, "the layers of top_heads.json", set(parts) == {layer for layer, _ in top}
    # In float64, so that what is left is the rounding of the parts when they were written.
    rest = sum(part.double() for part in parts.values()) - fv.double()
    yield paths.fv_by_layer, "parts that sum to fv_global_resid.pt", bool(rest.norm() <= 1e-5 * fv.double().norm())


def _step6_story(status: QidStatus, paths: QidPaths) -> Story:
    overall = read_json(paths.step6_summary)
    yield paths.step6_summary, "every layer", overall["completed_layers"] == status.expected_layers
    for layer in status.expected_layers:
        folder, entry = paths.step6_layer(layer), overall["per_layer"][str(layer)]
        summary_path, results_path = folder / "eval_summary.json", paths.artifacts / entry["results_path"]
        summary, results = read_json(summary_path), read_json(results_path)
        rows = artifacts.read_rows(folder / "eval_trials.jsonl")
        yield folder / "eval_trials.jsonl", "n_eval rows", len(rows) == summary["n_eval"]
        yield (
            results_path,
            "the layer's own summary and rows",
            (results["summary"], results["results"]) == (summary, rows),
        )
        yield (
            folder / "eval_meta.json",
            f"edit_layer {layer}",
            read_json(folder / "eval_meta.json")["edit_layer"] == layer,
        )
        kept = [entry[name] for name in ("acc_base", "acc_with", "score_value")]
        own = [summary[name] for name in ("acc_base", "acc_with", overall["score_key"])]
        yield paths.step6_summary, f"the numbers of layer {layer}", kept == own


def _sweeps_story(status: QidStatus, paths: QidPaths) -> Story:
    if SWEEPS in status.stages:
        found, settings = read_json(paths.sweeps), status.settings
        swept = tuple(tuple(entry["value"] for entry in found[name]) for name in ("alpha", "k"))
        yield paths.sweeps, "the alphas and k of qid_status.json", swept == (settings.alpha_sweep, settings.k_sweep)


def _is_of_a_run(status: QidStatus) -> bool:
    """True if the manifest has a run of this q_id with its fingerprint, or knows none of this q_id at all."""
    runs: list[dict[str, Any]] = []
    with suppress(RelfvError):  # reported for the manifest itself, or the q_id was made by single commands
        runs = [run for run in _runs(status.artifacts_dir.parent.parent) if status.q_id in run["q_list"]]
    fields = status.fingerprint_fields
    described = [{**run["settings"], **{name: run[name] for name in run.keys() & fields.keys()}} for run in runs]
    return not runs or any(all(has.get(name, value) == value for name, value in fields.items()) for has in described)
