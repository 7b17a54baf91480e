"""``relfv cross``: every q_id's function vector on every q_id's prompts, from a finished tree.

A q_id's folder depends on that q_id alone. What needs several of them lies beside their folders: cross_fv.json and
cross_fv.png, written again after each target, so that at every instant they hold all that is done. A target is kept
while the vectors, prompts and settings that it was made from are what they were; if that is all of them, the model is
never opened.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relfv.errors import InputError, RelfvError
from relfv.logs import show
from relfv.pace import Pace
from relfv.progress import at_work, headed
from relfv.relations import called
from relfv.report.page import write_report
from relfv.runs.qid import open_for, work_on
from relfv.runs.several import completed_q_ids, shared_settings
from relfv.settings import Settings
from relfv.stages.cross import (
    CROSS,
    CROSS_FIGURE,
    CROSS_SETTINGS,
    MEANING,
    compare_directions,
    cross_origin,
    inject_vectors,
    judge_target,
    overall_verdict,
    read_cross,
    write_cross,
)
from relfv.stages.function_vector import FV
from relfv.stages.step6_summary import STEP6_SUMMARY
from relfv.stages.zeroshot import evaluated_prompts
from relfv.stats import LEVEL
from relfv.store.files import move_aside, require_no_links, sha256_file
from relfv.store.folder import QidFolder
from relfv.store.locks import lock, sole_writer
from relfv.store.status import QidStatus

if TYPE_CHECKING:
    from relfv.language_model import LanguageModel

log = logging.getLogger(__name__)


def cross(folder: Path, q_list: Sequence[str] | None, overlay: Callable[[Settings], Settings]) -> int:
    """Cross the completed q_ids of a relation's ``folder``, or those of ``q_list``; ``overlay`` puts the command's
    flags over the settings that the q_ids were made with. Returns the exit code.

    Raises InputError for fewer than two q_ids, damaged ones, and another model or arithmetic than theirs.
    """
    for ours in (CROSS, CROSS_FIGURE, ".locks", "report"):
        require_no_links(folder / ours, below=folder)
    statuses = completed_q_ids(folder, q_list)
    settings = shared_settings(folder, statuses, overlay)
    with lock(folder / ".locks" / ".cross.lock") as holder:
        if holder:
            raise InputError(f"{folder / CROSS}: is being written by {holder}; wait for it to end, then run again")
        _Crossing(folder, statuses, named=q_list is not None).run(lambda: open_for(settings))
    log.info("report: %s", write_report(folder))
    show(folder / CROSS)
    return 0


class _Crossing:
    """One crossing of the q_ids ``statuses``, and the files it goes into."""

    def __init__(self, folder: Path, statuses: Mapping[str, QidStatus], *, named: bool) -> None:
        """Take ``named`` as True if the q_ids were named one by one; else they are all that are completed, and none may
        be missing."""
        self._folder, self._statuses, self._q_ids = folder, statuses, list(statuses)
        folders = [QidFolder(status.artifacts_dir, q_id) for q_id, status in statuses.items()]
        self._origins = {
            q_id: cross_origin(folder, q_id, self._q_ids, status.fingerprint_fields)
            for q_id, status in statuses.items()
        }
        self._vectors = np.stack([of_qid.read(FV) for of_qid in folders])
        self._earlier = self._found()
        earlier = self._earlier["targets"] if self._earlier else {}
        self._targets = {
            q_id: earlier[q_id]
            for q_id in self._q_ids
            if q_id in earlier and earlier[q_id]["made_from"] == self._origins[q_id]
        }
        if narrowed := [q_id for q_id in earlier if q_id not in statuses and not named]:
            raise InputError(
                f"{folder / CROSS} has {', '.join(narrowed)}, not completed now; let 'relfv run' finish, or name by "
                "--q_list the q_ids to cross without"
            )
        # Results that were computed and no longer fit are kept under a dated name.
        self._in_the_way = (folder / CROSS).exists() and not (self._earlier and earlier.keys() <= self._targets.keys())

    def run(self, opened: Callable[[], LanguageModel]) -> None:
        """Compute the targets that are missing or made from something else, and write after each."""
        todo = [q_id for q_id in self._q_ids if q_id not in self._targets]
        log.info("%d q_ids to cross, %d done before", len(todo), len(self._targets))
        if not todo:
            self._write_if_changed()
            return
        model, pace = opened(), Pace(len(todo))
        with headed(pace.heading):
            for q_id in todo:
                pace.begin()
                with at_work(q_id, "every vector on its prompts", pace.begin_stage(""), unit="prompts"):
                    self._targets[q_id] = self._judged(model, q_id)
                self._write()
                log.info("%s in %.1f s: %s", q_id, pace.seconds(), self._targets[q_id]["verdict"])
                pace.end()
        log.info("%s", self._document()["verdict"])

    def _found(self) -> dict[str, Any] | None:
        """The result of an earlier crossing, if it is there as it was written."""
        if not (self._folder / CROSS).exists():
            return None
        try:
            return read_cross(self._folder)
        except RelfvError as problem:
            log.warning("%s; it is kept under another name and made again", problem)
            return None

    def _judged(self, model: LanguageModel, target: str) -> dict[str, Any]:
        work = work_on(self._statuses[target], lambda: model)
        prompts, alpha, facts = work.once(evaluated_prompts), work.settings.alpha, model.facts()
        effects = inject_vectors(model, prompts, self._q_ids, self._vectors, alpha)
        judged = judge_target(effects, prompts, self._q_ids, target, work.read(STEP6_SUMMARY)["best_layer"])
        return {
            "verdict": judged.pop("verdict"),
            "alpha": alpha,
            "n_eval": len(prompts),
            "n_queries": len(set(prompts.clusters)),
            "made_from": self._origins[target],
            "made_by": {
                **{name: facts[name] for name in ("engine", "device", "dtype")},
                "prompts_per_pass": effects.per_pass,
            },
            **judged,
        }

    def _document(self) -> dict[str, Any]:
        """The content of cross_fv.json but for hashes; targets in the q_ids' order."""
        first = next(iter(self._statuses.values()))
        targets = {q_id: self._targets[q_id] for q_id in self._q_ids if q_id in self._targets}
        norms, cosine = compare_directions(self._vectors)
        return {
            "relation": self._folder.resolve().name,
            "verdict": overall_verdict(targets, len(self._q_ids)),
            "meaning": MEANING,
            "model": first.settings.model,
            **{name: first.fingerprint_fields[name] for name in CROSS_SETTINGS},
            "layers": first.expected_layers,
            "ci_level": LEVEL,
            "q_ids": self._q_ids,
            "norms": norms,
            "cosine": cosine,
            "targets": targets,
        }

    def _write(self) -> None:
        document = self._document()
        names = {q_id: status.name for q_id, status in self._statuses.items()}
        figure = _figure(document, names, next(iter(self._statuses.values())).settings)
        # The manifest and the page of a run lie in the same folder: one writer at a time.
        with sole_writer(self._folder):
            if self._in_the_way:
                log.info("earlier results are now %s", move_aside(self._folder / CROSS))
                self._in_the_way = False
            write_cross(self._folder, document, figure)

    def _write_if_changed(self) -> None:
        """Write the files if they differ: for a crossing that was killed between its two files, or lost its picture."""
        as_it_is = {**self._document(), "figure": {CROSS_FIGURE: sha256_file(self._folder / CROSS_FIGURE)}}
        if as_it_is != self._earlier:
            self._write()


def _figure(document: Mapping[str, Any], names: Mapping[str, str], settings: Settings) -> bytes:
    from relfv.figures.images import caption, cross

    q_ids, targets = document["q_ids"], document["targets"]
    layers = {q_id: entry["best_layer"] for q_id, entry in targets.items()}
    delta_p = np.full((len(q_ids), len(q_ids)), np.nan)
    for i, target in enumerate(q_ids):
        if target in targets:
            row = targets[target]["per_layer"][str(layers[target])]
            delta_p[i] = [row[source]["mean_delta_p"] for source in q_ids]
    shown = [called(q_id, names[q_id]) for q_id in q_ids]
    return cross(shown, [layers.get(q_id) for q_id in q_ids], delta_p, caption(settings)).to_bytes()
